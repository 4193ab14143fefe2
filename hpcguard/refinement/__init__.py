"""Attribution-guided adversarial refinement: which segments are spurious, the loss that suppresses them, the engine."""
