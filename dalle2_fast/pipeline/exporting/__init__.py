"""A pipeline's networks as files of other runtimes.

    networks    what is exported: modules whose arguments are tensors with names
    runtimes    ONNX and OpenVINO: how a module is written, and how its file is run
    export      the folder: files, their check against the networks, export.json
"""

FORMATS = ("onnx", "openvino")
