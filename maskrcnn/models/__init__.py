"""The Mask R-CNN model, one file per stage."""
