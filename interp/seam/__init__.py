"""The one place that touches transformers' internals.

Two sites of an attention layer are reached without any per-model code:

- the *call*: post-rotation q, k, v, mask, scaling and the returned z, at the function that
  transformers looks up by name (`interface`), or at `scaled_dot_product_attention` / `softmax`
  inside the attention module of families that never look it up (`functions`);
- `o_in`: the input of the output projection, after gates and sub-norms (`output`).

An `AttnCall` is what an observer sees. The model's own kernel makes z; where that kernel is the
one behind `scaled_dot_product_attention` on a CPU, it is asked for the row log-sum-exp as well
(`kernel`), which costs nothing and leaves every bit of z as it was.
"""
