"""How the lower bound on adversarial distortion is computed."""

from pydantic import Field

from hpcguard.config.section import Section


class BoundConfig(Section):
    images: int = Field(0, ge=0)
    """So many of the evaluated test images, the first ones, in the norm of evaluation.norm; 0: none."""
    certified: bool = True
    """A proven bound too: for feed-forward nets of images of up to 20,000 values; tens of seconds an image on a CPU."""
    split: bool = True
    """Also for changes of flagged pixels alone and of all others alone: three times the work."""
    evaluations: int = Field(3, gt=0, le=100)
    """Most radii at which an image's Jacobian is bounded."""
    steps: int = Field(20, gt=0)
    """Steps of PGD at every radius that the attack tries."""
