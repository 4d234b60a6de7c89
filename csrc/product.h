// total += a b, of matrices in a half-precision format or fp32, summed in fp32: what the CPU's own libraries offer torch only
// with the sum rounded to the format.

#pragma once

#include "head_pass.h"

namespace synpo {

// A matrix in memory: one of its strides is 1, the other `stride`.
struct Matrix {
  const void* data;
  int64_t stride;
  bool by_rows;  // numbers of a row are neighbours
};

struct Product {
  int64_t rows, columns, inner;
  Type type;
  Matrix a;  // (rows, inner)
  Matrix b;  // (inner, columns)
  float* total;  // (rows, columns), rows `total_stride` numbers apart
  int64_t total_stride;
};

void add_product(const Product& product);

}  // namespace synpo
