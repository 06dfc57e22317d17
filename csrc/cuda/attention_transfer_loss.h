#pragma once

#include "common/types.h"

namespace mvat::cuda {

// One side of a pair: a feature, or a map given as such (channels 1, is_map).
struct Side {
  Feature feature;
  bool is_map;
};

// Bytes of working memory that the forward pass over these pairs needs.
int64_t attention_transfer_loss_workspace(const Side* student, const Side* teacher, int64_t pairs);

// loss [pairs]. maps: the student's Q of all pairs, one behind the other, then in the same order the difference of the
// normalised maps N(Q_S) - N(Q_T). scalars [sum of B, 4]: of every clip max Q_S, max Q_S / ||Q_S||, the gradient's factor
// (0 where it is zero) and <N(Q_S), N(Q_S) - N(Q_T)>.
void attention_transfer_loss(const Side* student, const Side* teacher, int64_t pairs, float p, bool paper, float* loss,
                             float* maps, float* scalars, void* workspace, cudaStream_t stream);

// dx[i], contiguous and in the type of student[i], from grad [pairs].
void attention_transfer_loss_backward(const float* grad, const Side* student, int64_t pairs, const float* maps,
                                      const float* scalars, float p, void* const* dx, cudaStream_t stream);

}  // namespace mvat::cuda
