"""Presets: pure data. This file alone decides what is trained, how large it is and for how long.

A preset has a world and one recipe per stage: `model` (arguments of the constructor; the tokenizer adds those
of the vocabulary, CLIP those of the embeddings), `data` (options of the stage's batches) and `optimisation`.
Minutes are wall clock; `--minutes` scales them, `--steps` replaces them.
"""

from __future__ import annotations

from dalle2_fast.training.recipes import Optimisation, Preset, Recipe

# --------------------------------------------- scenes-cpu: about two and a half hours on one CPU core
SCENES_CPU = Preset(
    name="scenes-cpu",
    world=dict(
        shapes=["circle", "square", "triangle", "star", "heart", "ring"],
        colors=["red", "orange", "yellow", "green", "blue", "purple", "white", "black"],
        fills=["solid"], sizes=["small", "medium", "large"],
        relations=["left", "right", "above", "below"], backgrounds=["white", "black", "gray", "navy"],
        textures=["plain"], kinds=["one", "two", "count"]),
    clip=Recipe(
        model=dict(dim_text=128, text_enc_depth=3, text_heads=4, dim_image=128, visual_enc_depth=3,
                   visual_heads=4, visual_kind="conv_vit", visual_image_size=64, visual_patch_size=8,
                   dim_latent=192),
        optimisation=Optimisation(batch_size=64, minutes=25, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=50, hold=0.4,
                                  decay="linear", ema_decay=0.99, log_steps=20)),
    prior=Recipe(
        model=dict(net=dict(dim=128, depth=3, heads=4, dim_head=32)),
        data=dict(statistics_batches=16),
        optimisation=Optimisation(batch_size=64, minutes=8, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=50, hold=0.4,
                                  decay="linear", ema_decay=0.99, log_steps=20)),
    decoder=Recipe(
        # A text tower from scratch learns very slowly through the U-Net: after 4.5k images the error of x0 at
        # log-SNR -9, from text alone, was 0.188; with CLIP's tower it was 0.084 (without text: 0.35).
        # With 8 x 8 patches the whole net works on an 8 x 8 grid. A net that predicts x0 can do that, because
        # it need not represent the noise (Li and He 2025, arXiv 2511.13720). The layout is decided at low
        # log-SNR: a shape of 300 pixels is visible from -6. Below that only the caption says where it goes;
        # hence the shift, and the focus: without it one twelfth of the training times lies below -7. Such a
        # net cannot make outlines: from an image at log-SNR 2 it made the right shape in 72 % of the cases,
        # regardless of how long it was trained. The fine level makes them.
        model=dict(image_size=64, num_image_tokens=4, image_cond_drop_prob=0.4, text_cond_drop_prob=0.15,
                   text_encoder="clip",
                   unet=dict(in_channels=3, out_channels=3, patch_size=8, channels=(128,), layers_per_block=1,
                             attention_levels=(0,), head_dim=32, cross_dim=128, embed_dim=256, num_groups=8,
                             kernel_in=1, grid_size=8,
                             fine=dict(patch_size=2, channels=32, layers=4)),
                   schedule=dict(name="continuous_cosine", shift=-3.0), log_snr_focus=(-8.0, 1.0, 0.8),
                   prediction="sample", weighting="v", max_weight=5.0, stratified=True,
                   variance="fixed_small"),
        optimisation=Optimisation(batch_size=32, minutes=100, optimizer="muon", learning_rate=2e-3,
                                  betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=100, hold=0.1,
                                  decay="linear", ema_decay=0.998)),
    upsampler=Recipe(
        model=dict(image_size=256, low_res_size=64, resize="bicubic",
                   unet=dict(in_channels=6, out_channels=3, patch_size=4, channels=(48, 64),
                             layers_per_block=1, attention_levels=(), cross_dim=None, num_groups=8),
                   schedule=dict(name="continuous_cosine", shift=-2.0), prediction="sample", residual=True,
                   weighting="v", max_weight=5.0, stratified=True, variance="fixed_small"),
        data=dict(crop=64, crops_per_image=4),
        optimisation=Optimisation(batch_size=32, minutes=14, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, hold=0.4,
                                  decay="linear", ema_decay=0.995, log_steps=20)),
    sampling=dict(guidance=3.0, prior_guidance=2.0, candidates=4, sampler="ddim"),
    # Neither of the two has been tuned: sizes and lengths are those of the other prior and upsampler.
    ar_prior=Recipe(
        model=dict(net=dict(dim=128, depth=3, heads=4, num_components=48, num_buckets=128,
                            num_dot_buckets=32)),
        data=dict(statistics_batches=64),
        optimisation=Optimisation(batch_size=64, minutes=8, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=50, hold=0.4,
                                  decay="linear", ema_decay=0.99, log_steps=20)),
    upsampler2=Recipe(
        model=dict(image_size=1024, low_res_size=256, resize="bicubic", degradation="bsr", sample_tile=512,
                   unet=dict(in_channels=6, out_channels=3, patch_size=4, channels=(48, 64),
                             layers_per_block=1, attention_levels=(), cross_dim=None, num_groups=8),
                   schedule=dict(name="continuous_cosine", shift=-2.0), prediction="sample", residual=True,
                   weighting="v", max_weight=5.0, stratified=True, variance="fixed_small"),
        data=dict(crop=64, crops_per_image=16),
        optimisation=Optimisation(batch_size=32, minutes=14, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=50, hold=0.4,
                                  decay="linear", ema_decay=0.995, log_steps=20)),
)

# ------------------- scenes-gpu: the full world, ten minutes on one Hopper GPU; 40 MB in bf16 in total
# The checkpoint in the package was trained with it on an H200 (pretrained/scenes/training): clip and, at
# the same time, upsampler; then decoder and prior. Its decoder has an earlier recipe, which config.json
# states (prediction "sample", weighting "v" up to 5, focus on -8 to 1, no factors on the data), its
# upsampler had no sampled images, and the decoder had two more rounds with batches of 768, the last one
# after a part of the weights had been lost: 9.6 minutes and 1.5 million images in total. One run should see
# as many in five minutes, because scenes are made several batches at once. Optimiser, decay and dropped
# conditions are those of scenes-cpu. Averages cover the last 3 to 5 % of the steps. The recipe of the
# decoder below has not been trained yet.
SCENES_GPU = Preset(
    name="scenes-gpu",
    world={},
    clip=Recipe(
        model=dict(dim_text=192, text_enc_depth=3, text_heads=4, dim_image=192, visual_enc_depth=6,
                   visual_heads=4,
                   visual_kind="conv_vit", visual_image_size=64, visual_patch_size=4, dim_latent=192),
        optimisation=Optimisation(batch_size=1024, minutes=2, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=100, hold=0.4,
                                  decay="linear", ema_decay=0.99)),
    prior=Recipe(
        model=dict(net=dict(dim=224, depth=6, heads=7, dim_head=32)),
        data=dict(statistics_batches=8),
        optimisation=Optimisation(batch_size=1024, minutes=1, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.98), weight_decay=0.02, warmup_steps=100, hold=0.4,
                                  decay="linear", ema_decay=0.98)),
    decoder=Recipe(
        # Patches of 2 pixels make outlines without a fine level. A layout of 32 x 32 cells would have 44
        # million weights.
        # Weight 1 on the error of an "edm" network is SNR + 1 / sigma_data^2 = SNR + 2.8 on that of x0
        # (`loss_weight`): at log-SNR 4 it is 20 times that at low SNR, with "v" up to 5 it was 5 times. The
        # earlier focus on log-SNR -8 to 1 left 1.7 % of the times above 1, where outlines are made; up to 6
        # they are 30 %, and those below -2, which decide the layout, 47 % instead of 66 %.
        # Witness: a small unconditional net, 32 px, 900 steps of Muon; x0 at log-SNR -2, 0, 2, 4, 6, 8 in dB:
        # earlier recipe 20.7 24.4 26.1 26.4 26.4 26.2, this one 19.6 21.1 23.1 28.5 34.7 41.4, this one with
        # sigma_data 0.2 20.4 23.2 24.1 26.1 32.3 37.9. The standard deviation of the renders is 0.6.
        model=dict(image_size=64, num_image_tokens=4, image_cond_drop_prob=0.4, text_cond_drop_prob=0.15,
                   text_encoder="clip",
                   unet=dict(in_channels=3, out_channels=3, patch_size=2, channels=(112, 144),
                             layers_per_block=2, attention_levels=(1,), head_dim=48, cross_dim=192,
                             embed_dim=384, num_groups=16),
                   schedule=dict(name="continuous_cosine", shift=-3.0), log_snr_focus=(-8.0, 6.0, 0.8),
                   prediction="edm", sigma_data=0.6, weighting="uniform", stratified=True,
                   variance="fixed_small"),
        # Weak in the checkpoint of the earlier recipe: squares, diamonds, "inside" and three objects.
        data=dict(factors=dict(shapes=dict(square=1.5, diamond=1.5), kinds=dict(three=2.0),
                               relations=dict(inside=2.5))),
        optimisation=Optimisation(batch_size=384, minutes=5.5, optimizer="muon", learning_rate=2e-3,
                                  betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=200, hold=0.1,
                                  decay="linear", ema_decay=0.995)),
    upsampler=Recipe(
        model=dict(image_size=256, low_res_size=64, resize="bicubic",
                   unet=dict(in_channels=6, out_channels=3, patch_size=4, channels=(48, 80),
                             layers_per_block=2, attention_levels=(), cross_dim=None, num_groups=8),
                   schedule=dict(name="continuous_cosine", shift=-2.0), prediction="sample", residual=True,
                   weighting="v", max_weight=5.0, stratified=True, variance="fixed_small"),
        # Of the decoder's own small images the outlines of large objects have an IoU of 0.931; the upsampler,
        # trained on renders alone, makes 0.940 of them, and 0.986 of renders. Not trained yet.
        data=dict(crop=128, crops_per_image=2,
                  sampled=dict(fraction=0.75, strength=(0.2, 0.5), steps=12, guidance=(1.0, 3.0))),
        optimisation=Optimisation(batch_size=256, minutes=1.5, optimizer="muon", learning_rate=1.5e-3,
                                  betas=(0.9, 0.99), weight_decay=0.01, warmup_steps=100, hold=0.4,
                                  decay="linear", ema_decay=0.99)),
    # For the CPU of a laptop (benchmarks/results/main_job.json): the decoder's steps take most of the time.
    sampling=dict(steps=12, prior_steps=12, guidance=3.0, prior_guidance=2.0, candidates=2, sampler="dpm++"),
    # Neither of the two has been trained yet.
    ar_prior=Recipe(
        model=dict(net=dict(dim=224, depth=6, heads=7, num_components=96, num_buckets=256,
                            num_dot_buckets=64)),
        data=dict(statistics_batches=8),
        optimisation=Optimisation(batch_size=1024, minutes=5, learning_rate=1e-3, betas=(0.9, 0.98),
                                  weight_decay=0.02, warmup_steps=200, ema_decay=0.998, log_steps=20)),
    upsampler2=Recipe(
        model=dict(image_size=1024, low_res_size=256, resize="bicubic", degradation="bsr", sample_tile=512,
                   unet=dict(in_channels=6, out_channels=3, patch_size=4, channels=(48, 80),
                             layers_per_block=2, attention_levels=(), cross_dim=None, num_groups=8),
                   schedule=dict(name="continuous_cosine", shift=-2.0), prediction="sample", residual=True,
                   weighting="v", max_weight=5.0, stratified=True, variance="fixed_small"),
        data=dict(crop=256, crops_per_image=4),
        optimisation=Optimisation(batch_size=64, minutes=3.5, learning_rate=1e-3, betas=(0.9, 0.99),
                                  weight_decay=0.01, warmup_steps=200, ema_decay=0.999, log_steps=20)),
)

# --------------------------------------------- tiny: every stage in seconds, for tests; its images are noise
_BRIEF = Optimisation(batch_size=4, steps=4, warmup_steps=2, ema_decay=0.9, log_steps=2, first_validation=4)
TINY = Preset(
    name="tiny",
    world=dict(shapes=["circle", "square"], colors=["red", "blue", "white"], fills=["solid"],
               backgrounds=["black", "gray"], textures=["plain"], kinds=["one", "two"]),
    clip=Recipe(
        model=dict(dim_text=16, text_enc_depth=1, text_heads=2, dim_image=16, visual_enc_depth=1,
                   visual_heads=2,
                   visual_kind="conv_vit", visual_image_size=16, visual_patch_size=4, dim_latent=16),
        optimisation=_BRIEF),
    prior=Recipe(model=dict(net=dict(dim=16, depth=1, heads=2, dim_head=8)), data=dict(statistics_batches=2),
                 optimisation=_BRIEF),
    decoder=Recipe(
        model=dict(image_size=16, num_image_tokens=2, image_cond_drop_prob=0.2, text_cond_drop_prob=0.2,
                   text_encoder=dict(dim=16, depth=1, heads=2),
                   unet=dict(in_channels=3, out_channels=3, patch_size=2, channels=(16, 16),
                             layers_per_block=1,
                             attention_levels=(1,), head_dim=8, cross_dim=16, num_groups=4),
                   schedule="cosine", prediction="edm", sigma_data=0.6, weighting="uniform",
                   variance="fixed_small"),
        data=dict(foreground_weight=2.0, factors=dict(kinds=dict(two=2.0))),
        optimisation=_BRIEF),
    upsampler=Recipe(
        model=dict(image_size=32, low_res_size=16,
                   unet=dict(in_channels=6, out_channels=3, patch_size=2, channels=(16, 16),
                             layers_per_block=1,
                             attention_levels=(), cross_dim=None, num_groups=4)),
        data=dict(crop=16, crops_per_image=2),
        optimisation=_BRIEF),
    ar_prior=Recipe(
        model=dict(net=dict(dim=16, depth=1, heads=2, num_components=6, num_buckets=8, num_dot_buckets=4)),
        data=dict(statistics_batches=4),
        optimisation=_BRIEF),
    upsampler2=Recipe(
        model=dict(image_size=64, low_res_size=32, degradation="bsr",
                   unet=dict(in_channels=6, out_channels=3, patch_size=2, channels=(16, 16),
                             layers_per_block=1,
                             attention_levels=(), cross_dim=None, num_groups=4)),
        data=dict(crop=16, crops_per_image=2),
        optimisation=_BRIEF),
)

# ------------------------ photos-64 and karlo: for images of the user (--data), at real sizes. Not trained.
# Optimisation of both is unCLIP's (2204.06125, appendix C, table 3; quoted from memory, to be compared with
# the paper), with batches of photos-64 for eight GPUs and not for hundreds: as many samples in all would take
# years. docs/training.md says what they need.
def _adam(batch_size: int, steps: int, rate: float, beta: float, decay: float) -> Optimisation:
    return Optimisation(
        batch_size=batch_size, steps=steps, learning_rate=rate, betas=(0.9, beta), weight_decay=decay,
        warmup_steps=1000, ema_decay=0.9999, log_steps=100, save_minutes=20.0, validation_minutes=60.0,
    )  # fmt: skip


PHOTOS_64 = Preset(
    name="photos-64",
    world={},
    scenes=False,
    clip=Recipe(
        model=dict(dim_text=512, text_enc_depth=12, text_heads=8, dim_image=512, visual_enc_depth=12,
                   visual_heads=8, visual_kind="conv_vit", visual_image_size=64, visual_patch_size=4,
                   dim_latent=512),
        optimisation=_adam(4096, 100_000, 5e-4, 0.98, 0.2)),
    prior=Recipe(
        model=dict(net=dict(dim=768, depth=12, heads=12, dim_head=64)),
        data=dict(statistics_batches=16),
        optimisation=_adam(1024, 200_000, 1.1e-4, 0.96, 0.06)),
    decoder=Recipe(
        model=dict(image_size=64, text_encoder="clip",
                   unet=dict(in_channels=3, out_channels=3, channels=(192, 384, 576, 768),
                             layers_per_block=2, attention_levels=(1, 2, 3), head_dim=64, cross_dim=512,
                             embed_dim=768),
                   prediction="v_prediction", variance="fixed_small", stratified=True),
        optimisation=_adam(512, 300_000, 1.2e-4, 0.999, 0.0)),
    upsampler=Recipe(
        model=dict(image_size=256, low_res_size=64, degradation="blur",
                   unet=dict(in_channels=6, out_channels=3, channels=(128, 256, 384, 512),
                             layers_per_block=2, attention_levels=(), cross_dim=None),
                   prediction="v_prediction", variance="fixed_small", stratified=True),
        data=dict(crop=64),
        optimisation=_adam(256, 300_000, 1.2e-4, 0.999, 0.0)),
)
# The defaults of the classes are Karlo's sizes: 0.43, 1.02, 0.89 and 0.69 billion parameters.
KARLO = Preset(
    name="karlo",
    world={},
    scenes=False,
    clip=Recipe(model={}, optimisation=_adam(32768, 400_000, 5e-4, 0.98, 0.2)),
    prior=Recipe(model=dict(net={}), data=dict(statistics_batches=16),
                 optimisation=_adam(4096, 600_000, 1.1e-4, 0.96, 0.06)),
    decoder=Recipe(model=dict(text_encoder=None), optimisation=_adam(2048, 800_000, 1.2e-4, 0.999, 0.0)),
    upsampler=Recipe(model={}, data=dict(crop=64),
                     optimisation=_adam(1024, 1_000_000, 1.2e-4, 0.999, 0.0)),
)

PRESETS: dict[str, Preset] = {
    preset.name: preset for preset in (SCENES_CPU, SCENES_GPU, TINY, PHOTOS_64, KARLO)
}


def get_preset(name: str) -> Preset:
    """The preset called `name`. ValueError with the names that exist if there is none."""
    if name not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
