"""A pipeline on the Hugging Face hub: `push_to_hub`, and the model card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle2_fast.checkpoints.atomic import atomic_write
from dalle2_fast.pipeline.parts import PARTS

if TYPE_CHECKING:
    import torch

    from dalle2_fast.pipeline.dalle2 import DALLE2

CARD = "README.md"


def push_to_hub(
    pipe: DALLE2,
    repo_id: str,
    *,
    dtype: torch.dtype | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload a DALLE2 pipeline of dalle2_fast",
) -> str:
    """Upload the pipeline to the Hugging Face hub, from where `from_pretrained(repo_id)` loads it.

    A model card is added where the repository has no README.md; one that is there stays.

    Args:
        repo_id: "owner/name"; the repository is created if it does not exist.
        dtype: as in `save_pretrained`.
        private: whether a new repository is private; None is the default of its owner.
        token: of huggingface_hub; None is the one that `hf auth login` stored.
        revision: the branch; None is the main one.
        create_pr: whether to open a pull request in place of a commit.
        commit_message: of that commit.

    Returns:
        The address of the commit.

    Raises:
        ImportError: huggingface_hub is not installed.
        ValueError: repo_id is not "owner/name".

    Example::

        pipe.push_to_hub("owner/name", dtype=torch.bfloat16)
    """
    if not isinstance(repo_id, str) or repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"repo_id: expected 'owner/name', got {repo_id!r}")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ImportError(
            "push_to_hub needs huggingface_hub, which is not installed: pip install 'dalle2-fast[hub]'"
        ) from None
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        has_card = api.file_exists(repo_id, CARD, revision=revision)
        pipe.save_pretrained(folder, dtype=dtype)
        if not has_card:
            write_card(pipe, Path(folder), repo_id)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
    return str(commit.commit_url)


def write_card(pipe: DALLE2, folder: Path, name: str) -> None:
    """Write the model card of a pipeline as README.md; the one that is there is replaced.

    Args:
        pipe: the pipeline.
        folder: of its checkpoint.
        name: what `from_pretrained` takes.
    """
    with atomic_write(folder / CARD) as temporary:
        temporary.write_text(model_card(pipe, name), encoding="utf-8")


def model_card(pipe: DALLE2, name: str) -> str:
    """The model card of a pipeline: what it is made of, how it is used, with which settings it samples.

    Args:
        pipe: the pipeline.
        name: what `from_pretrained` takes: an id of the hub, or a folder.

    Returns:
        Markdown, with the header that the hub reads. Licence, training data and scores are for the person who
        publishes it: the pipeline does not know them.

    Example:
        >>> from dalle2_fast import DALLE2
        >>> model_card(DALLE2.from_pretrained(), "owner/name").splitlines()[5]
        '# name'
    """
    stages = {part: getattr(pipe, part) for part in PARTS if getattr(pipe, part) is not None}
    rows = [f"| {part} | {type(net).__name__} | {count_parameters(net):,} |" for part, net in stages.items()]
    words = getattr(pipe.tokenizer, "words", None)
    reads = "any text (CLIP's byte pairs)" if words is None else f"captions of {len(words)} words"
    settings = {key: value for key, value in pipe.sampling.items() if value is not None}
    sizes = ", ".join(f"{side} x {side}" for side in pipe.sizes)
    begin = "images" if pipe.prior is None else "captions"
    example = f'pipe("{_caption(pipe)}", seed=0)'
    if pipe.prior is None:
        example = "pipe.variations(image, 4, seed=0).images"
    return "\n".join([
        "---",
        "library_name: dalle2_fast",
        "pipeline_tag: text-to-image" if pipe.prior is not None else "pipeline_tag: image-to-image",
        "tags: [dall-e-2, unclip, text-to-image]",
        "---",
        f"# {name.rstrip('/').rpartition('/')[2]}",
        "",
        f"A DALL-E 2 (unCLIP) pipeline of dalle2_fast: from {begin} to images of {sizes} pixels. It reads "
        f"{reads}.",
        "",
        "| stage | class | parameters |",
        "|---|---|---|",
        *rows,
        "",
        "```python",
        "from dalle2_fast import DALLE2",
        "",
        f'pipe = DALLE2.from_pretrained("{name}")',
        f"images = {example}      # float32 [B, 3, {pipe.sizes[-1]}, {pipe.sizes[-1]}] in [0, 1]",
        "```",
        "",
        "Settings of a call that names none:",
        "",
        "```json",
        json.dumps(settings, indent=2),
        "```",
        "",
    ])  # fmt: skip


def count_parameters(network: Any) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in network.parameters())


def _caption(pipe: DALLE2) -> str:
    """A caption for the example: one that the tokenizer reads."""
    words = getattr(pipe.tokenizer, "words", None)
    if words is None:
        return "a painting of a fox"
    return "three green stars" if {"three", "green", "stars"} <= {*words} else " ".join(words[:2])
