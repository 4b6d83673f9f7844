"""What follows pretraining: fine-tuning, multi-view evaluation, probes of frozen features."""
