"""What others call our settings: TRL's DDPO and AlignProp configurations, and diffusers' training scripts.

``docs/coming_from.md`` has the whole translation, with what differs.
"""

OTHER_NAMES = {
    # TRL
    "num_epochs": "iterations",
    "sample_num_steps": "sampler.steps",
    "sample_eta": "sampler.eta",
    "sample_guidance_scale": "sampler.guidance",
    "sample_batch_size": "samples (of one iteration), rollout.batch (at once)",
    "sample_num_batches_per_epoch": "samples (of one iteration)",
    "train_batch_size": "algorithm.minibatches (optimiser steps), update.batch (images at once)",
    "train_gradient_accumulation_steps": "algorithm.minibatches (optimiser steps)",
    "train_num_inner_epochs": "algorithm.inner_epochs",
    "train_clip_range": "algorithm.clip",
    "train_timestep_fraction": "algorithm.timestep_weights",
    "per_prompt_stat_tracking": "algorithm.advantages",
    "per_prompt_stat_tracking_min_count": "algorithm.min_count",
    "train_learning_rate": "optimizer.learning_rate",
    "train_adam_beta1": "optimizer.betas",
    "train_adam_beta2": "optimizer.betas",
    "train_adam_weight_decay": "optimizer.weight_decay",
    "train_max_grad_norm": "optimizer.max_grad_norm",
    "truncated_backprop_rand": "algorithm.truncation",
    "truncated_backprop_timestep": "algorithm.last_steps (how many learn)",
    "mixed_precision": "model.precision",
    "use_lora": "model.train",
    "prompt_fn": "prompts",
    "reward_fn": "reward",
    "save_freq": "checkpoint.every",
    "num_checkpoint_limit": "checkpoint.keep_last",
    "log_with": "trackers",
    # diffusers
    "pretrained_model_name_or_path": "model.path",
    "num_inference_steps": "sampler.steps",
    "guidance_scale": "sampler.guidance",
    "learning_rate": "optimizer.learning_rate",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "checkpointing_steps": "checkpoint.every",
    "gradient_checkpointing": 'update.checkpoint = ["unet", "decoder"]',
}
"""Ours by theirs."""
