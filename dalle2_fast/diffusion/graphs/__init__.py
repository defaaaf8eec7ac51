"""Sampling steps as CUDA graphs.

    plan        SamplingPlan: everything that the steps of one run need, prepared
    static      StaticSteps: the steps of such runs on buffers that keep their addresses
    cache       SamplingGraphs: captured steps, one set for each shape; the least recently used are dropped
"""
