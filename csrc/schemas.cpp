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

  // The half of local_attention that has channels, in parts between which processes can exchange the statistics and the sums of
  // the norm behind the convolution. -> mean and biased variance [2, C] of the convolution's output.
  m.def("local_pool_statistics(Tensor x, Tensor depthwise, int segment_len) -> Tensor");
  // -> (pooled, index), as local_attention's.
  m.def("local_pool(Tensor x, Tensor depthwise, Tensor weight1, Tensor bias1, Tensor mean1, Tensor var1, int segment_len,"
        " float eps1) -> (Tensor, Tensor)");
  // grad is that of pooled, the mean's divided by C. -> sums [2, C] as norm_act_conv_backward's.
  m.def("local_pool_sums(Tensor grad, Tensor x, Tensor depthwise, Tensor weight1, Tensor bias1, Tensor mean1, Tensor var1,"
        " Tensor index, int segment_len, float eps1) -> Tensor");
  // means [2, C]: the sums divided by what they are of. -> gradients of x, depthwise.
  m.def("local_pool_backward(Tensor grad, Tensor x, Tensor depthwise, Tensor weight1, Tensor bias1, Tensor mean1, Tensor var1,"
        " Tensor index, Tensor means, int segment_len, float eps1) -> (Tensor, Tensor)");

  // a and m [heads, S, S] with S = segment_len: scores = (X a) X', output = (softmax(scores) X) m', wide.
  // -> (y; softmax [B, C, heads, P, 2], wide: the scores' maximum, in base 2 and as far as it was followed, and the sum of
  //     their exponentials below it; mixed [B, C, heads, P, S]: softmax(scores) X). Without `keep` the last two have a batch of 0.
  m.def("global_attention(Tensor x, Tensor a, Tensor m, int segment_len, bool keep) -> (Tensor, Tensor, Tensor)");
  // -> gradients of x, a, m.
  m.def("global_attention_backward(Tensor grad, Tensor x, Tensor a, Tensor m, Tensor softmax, Tensor mixed, int segment_len)"
        " -> (Tensor, Tensor, Tensor)");

  // y = conv(act(norm(x))) with the norm's four tensors [C] or none, all in the dtype of x; activation counts through ACTIVATIONS
  // (norm_act_conv.py). `training`: mean and var are those of x itself, and its gradient goes through them.
  // -> (y; statistics [2, out]: mean and biased variance of y over batch and time, or [0, out] unless wanted).
  m.def("norm_act_conv(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor weight, Tensor? bias,"
        " float eps, int activation, int stride, int padding, int groups, bool transposed, bool training, bool statistics)"
        " -> (Tensor, Tensor)");
  // -> (gradient dz behind the norm; sums [2, C] of dz and of dz x^, x^ = (x - mean) / sqrt(var + eps); gradients of weight and
  //     of bias, the latter [0] where there is none).
  m.def("norm_act_conv_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var,"
        " Tensor weight, bool has_bias, float eps, int activation, int stride, int padding, int groups, bool transposed)"
        " -> (Tensor, Tensor, Tensor, Tensor)");

  // y = act(norm(x) + norm(shortcut)); a norm's four tensors [C] or none, a shortcut or none.
  m.def("norm_act(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor? shortcut,"
        " Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? shortcut_mean, Tensor? shortcut_var, float eps,"
        " float shortcut_eps, int activation, bool training) -> Tensor");
  // -> (gradient dz behind both norms; sums as norm_act_conv_backward's for x, and for the shortcut or [0, C]).
  m.def("norm_act_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var,"
        " Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? shortcut_mean, Tensor? shortcut_var, float eps,"
        " float shortcut_eps, int activation) -> (Tensor, Tensor, Tensor)");
  // -> [2, C], mean and biased variance of x over batch and time.
  m.def("batch_statistics(Tensor x) -> Tensor");
  // The gradient of a norm's input from the one behind it; count: samples a channel that the sums [2, C] are of.
  m.def("norm_gradient(Tensor dz, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor sums, float eps, float count,"
        " bool training) -> Tensor");

  // y = relu(last (tanh . sigmoid) (gates norm(x) + gates_bias) + last_bias) + norm(shortcut): gates [2 hidden, C, 1] are tanh's
  // rows, then sigmoid's; last [out, hidden, 1]; everything in the dtype of x.
  m.def("mask_gate(Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor gates, Tensor gates_bias,"
        " Tensor last, Tensor last_bias, Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias, Tensor? shortcut_mean,"
        " Tensor? shortcut_var, float eps, float shortcut_eps, bool training) -> Tensor");
  // -> (gradient dz behind x's norm and its sums [2, C]; gradients of gates, gates_bias, last, last_bias; sums of grad, which is
  //     the gradient behind the shortcut's norm, [2, out] or [0, out]).
  m.def("mask_gate_backward(Tensor grad, Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, Tensor gates,"
        " Tensor gates_bias, Tensor last, Tensor last_bias, Tensor? shortcut, Tensor? shortcut_weight, Tensor? shortcut_bias,"
        " Tensor? shortcut_mean, Tensor? shortcut_var, float eps, float shortcut_eps)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // Blocks for inference, float32, their batch norms folded into weights and biases. conv_act: weight [kernel, out, in].
  m.def("conv_act(Tensor x, Tensor weight, Tensor bias, int stride, int padding, bool transposed, int activation) -> Tensor");
  // y = relu(last silu(middle silu(depthwise glu(first x))) + shortcut x): [out, in] each, depthwise [in, kernel]; the last
  // bias is that of both.
  m.def("conformer_block(Tensor x, Tensor first, Tensor first_bias, Tensor depthwise, Tensor depthwise_bias, Tensor middle,"
        " Tensor middle_bias, Tensor last, Tensor shortcut, Tensor last_bias) -> Tensor");
  // y = relu(last (tanh . sigmoid)(gates relu(branches views))) + shortcut x: branches [3, 3 taps, n, n], gates [2 hidden, 3 n].
  m.def("multi_view_merge(Tensor x, Tensor view0, Tensor view1, Tensor view2, Tensor branches, Tensor branches_bias, Tensor gates,"
        " Tensor gates_bias, Tensor last, Tensor last_bias, Tensor shortcut, Tensor shortcut_bias) -> Tensor");

  // A number that the tensors' values leave: another one tells that they were written to.
  m.def("fingerprint(Tensor[] tensors) -> int");
}
