"""Run folders: records, checkpoints that outlive any accident, and what is read from them."""
