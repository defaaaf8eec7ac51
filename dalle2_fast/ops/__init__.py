"""The ops, one module per op: the public function, its checks and its reference, in this order.

`dalle2_fast.functional` exports the public functions, `dalle2_fast.reference` the references.
"""
