"""What the files and folders of a run are called, and its algorithm. Needs no torch."""

CONFIG, METRICS, EVALUATIONS = "config.toml", "metrics.jsonl", "evaluations.jsonl"
EXPLORATION, ENVIRONMENT = "exploration.jsonl", "environment.json"
CHECKPOINTS, SAMPLES, BEST = "checkpoints", "samples", "best"
PROMPTS, SETS = "prompts.json", "sets.json"  # of the previews: each one's prompt, and the prompt set that it is from
CARD = "README.md"  # beside what was trained
RECORDS = (METRICS, EVALUATIONS, EXPLORATION)
"""The files of JSON lines, of which checkpoints hold copies."""

TITLES = {"ddpo": "DDPO", "alignprop": "AlignProp"}
"""How the algorithms of the recipes are spelled where people read."""
