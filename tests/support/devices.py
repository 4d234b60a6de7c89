"""Where models of tests live: on a GPU if there is one, so that decoding and vision run there too."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
