"""Writes golden.json with the scores of the published packages on tiny models with weights from ``formula``.

Made once with hpsv2 1.2.0, image-reward 1.5 and simple-aesthetics-predictor 0.1.2 in an environment of their own:

    pip install hpsv2==1.2.0 image-reward==1.5 simple-aesthetics-predictor==0.1.2 transformers==4.30.2 timm==0.6.13 \
        fairscale==0.4.13 torch torchvision
    python tests/golden/rewards/make.py

Only their own classes compute the scores; what is tiny is the size of the layers. Where a package resizes with Pillow,
which rounds to 8 bits, the images have the model's size already, so that the comparison can be strict.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from formula import image, weights
from PIL import Image

HERE = Path(__file__).parent


def shapes(model: torch.nn.Module) -> dict:
    return {name: list(value.shape) for name, value in model.state_dict().items() if value.is_floating_point()}


def layout(model: torch.nn.Module) -> list:
    """A full-size model's weights, layers folded: [name with {} for the layer's number, shape, layers or 0]."""
    rows = {}
    for name, value in model.state_dict().items():
        folded = re.sub(r"(blocks|resblocks|layer)\.\d+\.", r"\1.{}.", name)
        rows.setdefault(folded, [folded, list(value.shape), 0])[2] += "{}" in folded
    return list(rows.values())


def published() -> dict:
    """The layouts of the published sizes, without weights."""
    clip = module("hpsv2", "src.open_clip.model")
    config = json.loads((Path(clip.__file__).parent / "model_configs" / "ViT-H-14.json").read_text())
    vit = module("ImageReward", "models.BLIP.vit")
    med = module("ImageReward", "models.BLIP.med")
    # med_config.json of THUDM/ImageReward.
    text = med.BertConfig(vocab_size=30524, add_cross_attention=True, encoder_width=1024)
    blip = torch.nn.Module()
    blip.visual_encoder = vit.VisionTransformer(img_size=224, patch_size=16, embed_dim=1024, depth=24, num_heads=16)
    with torch.device("meta"):
        blip.text_encoder = med.BertModel(config=text, add_pooling_layer=False)
        hps = clip.CLIP(**config)
    return {"hpsv2": layout(hps), "imagereward": [[f"blip.{name}", *rest] for name, *rest in layout(blip)]}


def epsilons(model: torch.nn.Module) -> list:
    return sorted({layer.eps for layer in model.modules() if isinstance(layer, torch.nn.LayerNorm)})


def fill(model: torch.nn.Module, prefix: str) -> torch.nn.Module:
    state = model.state_dict()
    made = weights({prefix + name: tuple(shape) for name, shape in shapes(model).items()})
    for name in shapes(model):
        state[name] = torch.from_numpy(made[prefix + name])
    model.load_state_dict(state)
    return model.eval()


def module(package: str, path: str) -> object:
    """Import one module of a package without running the package's __init__, which wants all its dependencies."""
    root = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    names = [package, *(f"{package}.{part}" for part in _parents(path))]
    for name in names:
        if name not in sys.modules:
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{path}")


def _parents(path: str) -> list[str]:
    parts = path.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def hpsv2() -> dict:
    clip = module("hpsv2", "src.open_clip.model")
    transform = module("hpsv2", "src.open_clip.transform")
    model = clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
        output_dict=True,
    )
    fill(model, "hpsv2/")
    tokens = torch.tensor([[48, 3, 17, 5, 49] + [0] * 7, [48, 9, 30, 31, 32, 33, 2, 49] + [0] * 4])
    preprocess = transform.image_transform(32, is_train=False, resize_longest_max=True)
    scores = {}
    for name, (height, width) in {"square": (64, 64), "wide": (40, 72)}.items():
        pictures = [Image.fromarray(image(f"hpsv2/{name}/{index}", height, width)) for index in range(2)]
        with torch.no_grad():
            # The file as score() treats it, less autocast: it rounds to half precision.
            out = model(torch.stack([preprocess(picture) for picture in pictures]), tokens)
        scores[name] = torch.diagonal(out["image_features"] @ out["text_features"].T).tolist()
    return {"tokens": tokens.tolist(), "scores": scores, "shapes": shapes(model), "eps": epsilons(model)}


def image_reward() -> dict:
    vit = module("ImageReward", "models.BLIP.vit")
    med = module("ImageReward", "models.BLIP.med")
    reward = module("ImageReward", "ImageReward")
    model = reward.ImageReward.__new__(reward.ImageReward)
    torch.nn.Module.__init__(model)
    model.device, model.mean, model.std = "cpu", 0.16717362830052426, 1.0333394966054072
    model.preprocess = reward._transform(32)
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    config = med.BertConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        add_cross_attention=True,
        encoder_width=32,
    )
    model.blip.text_encoder = med.BertModel(config=config, add_pooling_layer=False)
    model.mlp = reward.MLP(24)
    fill(model, "imagereward/")
    ids = torch.zeros(2, 35, dtype=torch.long)
    ids[0, :5] = torch.tensor([11, 7, 8, 9, 12])
    ids[1, :9] = torch.tensor([11, 30, 31, 32, 33, 34, 35, 36, 12])
    mask = (ids != 0).long()
    pictures = [Image.fromarray(image(f"imagereward/{index}", 32, 32)) for index in range(2)]
    pixels = torch.stack([model.preprocess(picture) for picture in pictures])
    with torch.no_grad():
        scores = model.score_gard(ids, mask, pixels).squeeze(1)
    eps = epsilons(model.blip.visual_encoder) + epsilons(model.blip.text_encoder)
    tokens = {"ids": ids.tolist(), "mask": mask.tolist()}
    return {**tokens, "scores": scores.tolist(), "shapes": shapes(model), "eps": eps}


def aesthetic() -> dict:
    v2 = module("aesthetics_predictor", "v2")
    config = v2.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    model = fill(v2.AestheticsPredictorV2Linear(config), "aesthetic/")
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pictures = [Image.fromarray(image(f"aesthetic/{index}", 32, 32)) for index in range(2)]
    with torch.no_grad():
        scores = [model(**processor(picture, return_tensors="pt")).logits.item() for picture in pictures]
    return {"scores": scores, "shapes": shapes(model)}


if __name__ == "__main__":
    golden = {"hpsv2": hpsv2(), "imagereward": image_reward(), "aesthetic": aesthetic(), "published": published()}
    (HERE / "golden.json").write_text(json.dumps(golden) + "\n")
    print({name: value["scores"] for name, value in golden.items() if "scores" in value}, np.__version__)
