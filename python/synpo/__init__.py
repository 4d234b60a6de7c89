"""SynPO: from videos to a preference-tuned captioner. The loss kernels live in `synpo_kernels`."""

__version__ = "0.1.0"
