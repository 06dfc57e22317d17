// The operators of torch.ops.mvat and their arguments. csrc/cpu and csrc/cuda register what runs, mvat/kernels what is public.
//
// Features x are [B, C, T]. "Wide" is float64 for float64 features, else float32: parameters, statistics and their gradients are
// wide, so that half precision meets them on a GPU only in the features themselves. A backward operator gives every gradient.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mvat, m) {
  // x -> map [B, T], wide.
  m.def("attention_map(Tensor x, float p) -> Tensor");
  m.def("attention_map_backward(Tensor grad, Tensor x, float p) -> Tensor");

  // Pairs of features [B, C, T] or maps [B, T], of any sizes -> (loss [pairs]; maps, flat: the student's of all pairs, then
  // the differences of the normalised maps; scalars [sum of B, 4]: what the backward pass
  // needs of each clip), all wide.
  m.def("attention_transfer_loss(Tensor[] student, Tensor[] teacher, float p, bool paper) -> (Tensor, Tensor, Tensor)");
  m.def("attention_transfer_loss_backward(Tensor grad, Tensor[] student, Tensor maps, Tensor scalars, float p, bool paper)"
        " -> Tensor[]");

  // -> (y; gate [B, C], pooled [2, B, C]: maximum and mean, wide; index [B, C] int64 of the first maximum).
  m.def("channel_attention(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  // -> gradients of x, weight1, bias1, weight2, bias2.
  m.def("channel_attention_backward(Tensor grad, Tensor x, Tensor gate, Tensor pooled, Tensor index, Tensor weight1,"
        " Tensor bias1, Tensor weight2) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

  // P chunks of S samples, hop S / 2. Without `training` the means and variances given are taken, with it the batch's.
  // -> (y; attention [B, P, S], pooled [B, 2, P, S]: maximum and mean over channels, wide; index [B, P, S] int32 of the first
  //     maximum's channel; statistics [2, C + 1], wide: means, then biased variances, of the C channels and of the mask).
  m.def("local_attention(Tensor x, Tensor depthwise, Tensor weight1, Tensor bias1, Tensor mean1, Tensor var1, Tensor conv,"
        " Tensor weight2, Tensor bias2, Tensor mean2, Tensor var2, int segment_len, float eps1, float eps2, bool training)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> gradients of x, depthwise, weight1, bias1, conv, weight2, bias2.
  m.def("local_attention_backward(Tensor grad, Tensor x, Tensor depthwise, Tensor weight1, Tensor bias1, Tensor conv,"
        " Tensor weight2, Tensor attention, Tensor pooled, Tensor index, Tensor statistics, int segment_len, float eps1,"
        " float eps2, bool training) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // a and m [heads, S, S] with S = segment_len: scores = (X a) X', output = (softmax(scores) X) m', wide.
  // -> (y; softmax [B, C, heads, P, 2], wide: the scores' maximum, in base 2 and as far as it was followed, and the sum of
  //     their exponentials below it; mixed [B, C, heads, P, S]: softmax(scores) X). Without `keep` the last two have a batch of 0.
  m.def("global_attention(Tensor x, Tensor a, Tensor m, int segment_len, bool keep) -> (Tensor, Tensor, Tensor)");
  // -> gradients of x, a, m.
  m.def("global_attention_backward(Tensor grad, Tensor x, Tensor a, Tensor m, Tensor softmax, Tensor mixed, int segment_len)"
        " -> (Tensor, Tensor, Tensor)");
}
