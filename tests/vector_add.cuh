#pragma once
// Order and types as `PARAMS` in test_jit_launch.py packs them.
struct Params {
  const float* a;
  const float* b;
  float* out;
  long long count;
};
