"""ClipLoss and SigLipLoss in open_clip's own training script.

    python -m dalle2_fast.adapters.open_clip --model ViT-B-32 --train-data ...

runs `open_clip_train.main` with these losses. open_clip 3.3 makes its loss in `open_clip.factory`, later
versions make it in `open_clip.task` from `open_clip.loss`; both are reached.
"""

from __future__ import annotations

import sys
from importlib import import_module

from dalle2_fast.losses import ClipLoss, SigLipLoss

LOSSES = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}
# Where open_clip makes its losses. Which of the last two exist depends on the version.
MODULES = ("open_clip.loss", "open_clip", "open_clip.factory", "open_clip.task")


def use_losses() -> list[str]:
    """Let open_clip make ClipLoss and SigLipLoss of dalle2_fast from now on, in this process.

    Classes that open_clip has derived from its loss (CoCaLoss, DistillClipLoss) keep their base class.

    Returns:
        The replaced names, such as "open_clip.factory.ClipLoss"; each is also printed.

    Raises:
        ImportError: open_clip is not installed.
        RuntimeError: this version of open_clip makes its losses somewhere else, so that training would go on
            with open_clip's own loss.

    Example::

        from dalle2_fast.adapters.open_clip import use_losses
        use_losses()
        loss = open_clip.create_loss(args)    # a dalle2_fast ClipLoss
    """
    loaded = [_import(name) for name in MODULES]
    originals = {name: getattr(loaded[0], name, None) for name in LOSSES}
    if None in originals.values():
        raise RuntimeError("open_clip.loss: expected ClipLoss and SigLipLoss there, this version has others")
    # Modules that were imported earlier, such as open_clip_train.main, may hold a class by its name, too.
    packages = ("open_clip", "open_clip_train")
    found = [module for key, module in sys.modules.items() if key.partition(".")[0] in packages and module]
    replaced = []
    for module in found:
        for name, original in originals.items():
            if vars(module).get(name) is original and original is not LOSSES[name]:
                setattr(module, name, LOSSES[name])
                replaced.append(f"{module.__name__}.{name}")
    makers = [module for module in loaded[2:] if module is not None]
    if not makers:
        raise RuntimeError("open_clip: expected a module factory or task that makes the loss, found neither")
    for line in sorted(replaced):
        name = line.rpartition(".")[2]
        print(f"dalle2_fast: {line} is now {LOSSES[name].__module__}.{name}")
    return sorted(replaced)


def _import(name: str):
    """The module, or None for one of those that not every version has."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "open_clip":
            raise ImportError(
                "dalle2_fast.adapters.open_clip needs the package open_clip (pip install open_clip_torch)"
            ) from None
        if error.name == name and name in MODULES[2:]:
            return None
        raise


def main() -> None:
    """Run open_clip's training script with the arguments of the command line."""
    use_losses()
    import_module("open_clip_train.main").main(sys.argv[1:])


if __name__ == "__main__":
    main()
