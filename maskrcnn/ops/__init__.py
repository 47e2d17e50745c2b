"""Stateless tensor operations: boxes, anchors, matching, NMS, RoI layers, masks."""
