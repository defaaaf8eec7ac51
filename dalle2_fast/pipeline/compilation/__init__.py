"""The networks of a pipeline as compiled programs, which are kept on disk.

    pipeline        DALLE2.compile: which networks are compiled
    network         one network's method, as one program for each set of shapes and dtypes
    inductor        programs of torch's compiler, AOTInductor
    openvino        programs of OpenVINO
    store           the folder of programs, and what their names depend on
    graphs          DALLE2.capture: sampling steps as CUDA graphs
"""

BACKENDS = ("inductor", "openvino")
