"""What a decoder makes of true images with noise in one step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import guided_denoiser
from dalle2_fast.models.decoder.inpainting import nothing_kept
from dalle2_fast.models.decoder.model import Decoder

LOG_SNRS = (-2, 0, 2, 4, 6, 8)


@torch.no_grad()
def denoise_once(
    decoder: Decoder,
    images: Tensor,  # [n, 3, R, R] in [0, 1]
    image_embed: Tensor,  # [n, E]
    text: Tensor,  # int64 [n, L]
    seeds: Tensor,  # int64 [n]
    log_snrs: tuple[int, ...] = LOG_SNRS,
) -> Iterator[tuple[int, Tensor]]:
    """x0 of noisy images, predicted in one step and without guidance, for each log-SNR of the input.

    Args:
        decoder: to be measured.
        images: true images of the decoder's size, on its device.
        image_embed: their CLIP embeddings.
        text: their captions, as the decoder's token ids.
        seeds: of the noise, which is the same at every log-SNR.
        log_snrs: where to measure.

    Yields:
        (log-SNR, x0 as images [n, 3, R, R] in [0, 1]).
    """
    weight, diffusion = decoder.unet.conv_in.weight, decoder.diffusion
    x0 = images.to(weight.dtype) * 2 - 1
    caption = encode_captions(decoder, len(x0), text, None, None, None)
    extra = nothing_kept(x0.shape, weight) if decoder.inpaint else None
    net = guided_denoiser(decoder, len(x0), image_embed, caption, None, extra=extra).conditional_net
    for log_snr in log_snrs:
        wanted = torch.full((len(x0),), float(log_snr), dtype=torch.float64, device=x0.device)
        t = diffusion.schedule.time_at(wanted)
        x_t = diffusion.add_noise(x0, t, seeds=seeds)
        output = net(diffusion.network_input(x_t, t), diffusion.schedule.net_time(t))
        predicted = diffusion.predict_x0(x_t, t, diffusion.split_output(output, x_t)[0])
        yield log_snr, ((predicted + 1) / 2).clamp(0, 1)
