from dalle2_fast.data.synthetic.world import World

__all__ = ["World"]
