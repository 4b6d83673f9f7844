"""From frames and pictures to what a network takes."""
