"""Pure functions on tensors: boxes, anchors, matching, NMS, RoI layers, masks."""
