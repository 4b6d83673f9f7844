"""From frames and images to what a network takes."""
