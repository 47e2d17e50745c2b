"""From detections to COCO results, and from results to average precision."""
