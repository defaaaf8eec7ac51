"""Our CLIP, prior and decoder in DALLE2-pytorch: in its trainers, its DALLE2, and its classes that take a
CLIP.

    from dalle2_fast.adapters.dalle2_pytorch import ClipAdapter, Decoder, DiffusionPrior

    trainer = DecoderTrainer(Decoder(decoder, upsampler), lr=3e-4)         # of dalle2_pytorch.trainer
    loss = trainer(images, image_embed=z, text_encodings=t, unet_number=1)
    trainer.update(unet_number=1)

The three classes are subclasses of DALLE2-pytorch's classes, which its trainers require. They are created
when one of them is first named, which raises ImportError if the package is not installed. They hold our
module and translate the calls; the numbers are those of our modules. Written for and tested with
dalle2-pytorch 1.15.6.
"""

from __future__ import annotations

import functools

from dalle2_fast.adapters._foreign import attach_classes, needed_package, subclass

_NAMES = ("ClipAdapter", "Decoder", "DiffusionPrior")

__all__ = [*_NAMES]


@functools.cache
def _classes() -> dict[str, type]:
    with needed_package("dalle2-pytorch", __name__):
        import dalle2_pytorch.dalle2_pytorch as theirs
    from dalle2_fast.adapters.dalle2_pytorch import clip, decoder, prior

    adapter = subclass(__name__, "ClipAdapter", clip.AdaptedClip, theirs.BaseClipAdapter)
    adapter.embedded_text, adapter.embedded_image = theirs.EmbeddedText, theirs.EmbeddedImage
    made = {
        "ClipAdapter": adapter,
        "Decoder": subclass(__name__, "Decoder", decoder.AdaptedDecoder, theirs.Decoder),
        "DiffusionPrior": subclass(__name__, "DiffusionPrior", prior.AdaptedPrior, theirs.DiffusionPrior),
    }
    made["Decoder"].clip_adapter = made["DiffusionPrior"].clip_adapter = adapter
    return made


__getattr__, __dir__ = attach_classes(__name__, _NAMES, _classes)
