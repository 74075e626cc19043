"""Data: from raw records to the batches a model is trained on and the examples it is judged by."""

import os

# TensorFlow only feeds data here: no faster arithmetic, and no messages through the progress bar.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
