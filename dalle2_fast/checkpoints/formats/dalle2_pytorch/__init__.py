"""The files of DALLE2-pytorch.

    stored   which weights a file holds, and of which version
    prior    the arguments of the prior's network, and its tensors under their newest names
    unet     the same of a U-Net of its decoder
"""
