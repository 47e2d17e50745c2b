"""Pictures: objects drawn on images, and what RoI layers read."""
