"""Where the published rewards' weights come from, how big they are and under which licence. Needs no torch.

What was checked is what is loaded: revisions are commits, and pickles are read only once their SHA-256 was checked. The
aesthetic predictor's revision is the branch "main", so its SHA-256 alone says that it is the same file. The hashes are
those that public projects pin; where none was found, as for HPSv2.0, the user has to vouch for the file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from diffexp.errors import UserError
from diffexp.rewards.spec import check_name, parse

TRUST = "DIFFEXP_TRUST_SHA256"
CACHE = "DIFFEXP_CACHE"
CLIP_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Source:
    """Files of one revision of one hub repository. ``size`` is in bytes, rounded; ``sha256`` is that of a pickle."""

    what: str
    repo: str
    revision: str
    files: tuple[str, ...]
    size: int
    licence: str
    sha256: str | None = None

    @property
    def pickled(self) -> bool:
        """Whether it is one pickled file, which is only ever read after its hash was checked."""
        return self.files[0].endswith((".pt", ".pth"))


@dataclass(frozen=True)
class Requirement:
    """What a reward needs: a source, and which of its files are not on this machine yet."""

    source: Source
    missing: tuple[str, ...] = field(default=())

    @property
    def present(self) -> bool:
        """Whether nothing has to be downloaded."""
        return not self.missing


CLIP_L = Source(
    what="CLIP ViT-L/14 and its tokenizer",
    repo="openai/clip-vit-large-patch14",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    files=("config.json", "model.safetensors", *CLIP_TOKENIZER_FILES),
    size=1_710_000_000,
    licence="none stated for the weights; OpenAI's CLIP code is MIT",
)
CLIP_H_TOKENIZER = Source(
    what="tokenizer of CLIP ViT-H/14",
    repo="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    revision="1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    files=CLIP_TOKENIZER_FILES,
    size=4_000_000,
    licence="MIT",
)
BERT_TOKENIZER = Source(
    what="tokenizer of BERT",
    repo="google-bert/bert-base-uncased",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    files=("vocab.txt", "tokenizer.json", "tokenizer_config.json"),
    size=700_000,
    licence="Apache-2.0",
)
AESTHETIC_HEAD = Source(
    what="LAION's improved aesthetic predictor",
    repo="haor/aesthetics",
    revision="main",
    files=("sac+logos+ava1-l14-linearMSE.pth",),
    size=3_714_759,
    licence="Apache-2.0",
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
)
PICKSCORE = Source(
    what="PickScore",
    repo="yuvalkirstain/PickScore_v1",
    revision="a4e4367c6dfa7288a00c550414478f865b875800",
    files=("config.json", "model.safetensors"),
    size=3_940_000_000,
    licence="none stated for the weights; its code is MIT",
)
HPS_21 = Source(
    what="HPSv2.1",
    repo="xswu/HPSv2",
    revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    files=("HPS_v2.1_compressed.pt",),
    size=1_972_490_005,
    licence="Apache-2.0",
    sha256="c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
)
HPS_20 = Source(
    what="HPSv2.0",
    repo="xswu/HPSv2",
    revision="697403c78157020a1ae59d23f111aa58ced35b0a",
    files=("HPS_v2_compressed.pt",),
    size=1_970_000_000,
    licence="Apache-2.0",
)
IMAGEREWARD = Source(
    what="ImageReward",
    repo="THUDM/ImageReward",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
    files=("ImageReward.pt",),
    size=1_790_000_000,
    licence="Apache-2.0",
    sha256="d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
)

NEEDS = {
    "aesthetic": (CLIP_L, AESTHETIC_HEAD),
    "clipscore": (CLIP_L,),
    "pickscore": (PICKSCORE, CLIP_H_TOKENIZER),
    "hpsv2": (HPS_21, CLIP_H_TOKENIZER),
    "hpsv2.0": (HPS_20, CLIP_H_TOKENIZER),
    "imagereward": (IMAGEREWARD, BERT_TOKENIZER),
}


def check(spec: str) -> list[Requirement]:
    """What the rewards of ``spec`` need beyond this package, and what of it is missing on this machine.

    Raises:
        UserError: for an unknown reward.
    """
    check_name(spec)
    names = [member.name for member in parse(spec)]
    return [Requirement(source, _missing(source)) for name in names for source in NEEDS.get(name, ())]


def cache_folder() -> Path:
    """Where converted weights lie: ``$DIFFEXP_CACHE``, else ``diffexp`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(base) / "diffexp") / "rewards"


def trusted() -> tuple[str, ...]:
    """The SHA-256 digests that the user vouches for, from ``$DIFFEXP_TRUST_SHA256``, comma-separated.

    Raises:
        UserError: for one that is no SHA-256 digest.
    """
    digests = tuple(part.strip().lower() for part in os.environ.get(TRUST, "").split(",") if part.strip())
    for digest in digests:
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise UserError(f"{TRUST} has {digest!r}, which is no SHA-256: it takes 64 hex digits, comma-separated")
    return digests


def converted_folder(source: Source, digest: str) -> Path:
    """Where the conversion of the pickle with this digest lies, once it has been made."""
    return cache_folder() / f"{Path(source.files[0]).stem}-{digest[:16]}"


def find_converted(source: Source) -> Path | None:
    """The conversion of a pickle whose digest is known or trusted, if there is one."""
    accepted = ((source.sha256,) if source.sha256 else ()) + trusted()
    folders = (converted_folder(source, digest) for digest in accepted)
    return next((folder for folder in folders if folder.is_dir()), None)


def _missing(source: Source) -> tuple[str, ...]:
    from huggingface_hub import try_to_load_from_cache

    if source.pickled and (find_converted(source) or (cache_folder() / source.files[0]).is_file()):
        return ()
    cached = {name: try_to_load_from_cache(source.repo, name, revision=source.revision) for name in source.files}
    return tuple(name for name, path in cached.items() if not isinstance(path, str))
