"""What leaves a run: headers of LoRA files, the model card, the way to the hub."""
