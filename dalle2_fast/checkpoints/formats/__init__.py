"""The layouts in which other projects publish weights.

    diffusers, diffusers_options   a pipeline of diffusers or its prior, and what its configuration files say
    karlo                          Karlo's original files
    guided_diffusion, glide, adm   the U-Nets of guided-diffusion and GLIDE
    dalle2_pytorch/                the files of DALLE2-pytorch's trainers
    karlo_keys, unet_keys          which tensors of these make which of ours
    clip, clip_options, clip_keys  a CLIP alone: its files, its configuration, its tensors
    renaming                       the rules from their names to ours

A new layout of a pipeline or network is a module here with a reader, and a line in LAYOUTS of
checkpoints/layouts.py. A new layout of a CLIP is an entry in NAMINGS of clip_keys.py, and a function in
clip_options.py if it has a configuration of another form.
"""
