"""A reward: how red an image is. Run it as `--set reward=examples/redness.py:redness`."""


def redness(images, prompts):
    """B numbers for images (B, 3, H, W) in [0, 1] and their B prompts; higher is better."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


redness.differentiable = True  # only torch on the images: AlignProp may backpropagate through it
