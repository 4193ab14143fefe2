"""hpcguard: attribution on a cluster, attribution-guided adversarial refinement, honest evaluation."""

__version__ = "0.1.0"
