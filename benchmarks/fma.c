// Multiply-adds that never leave the registers: twelve chains hide the latency of one.
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define CHAINS 12

typedef float vector __attribute__((vector_size(WIDTH)));

long flops_a_step(void) { return 2L * CHAINS * (WIDTH / sizeof(float)); }

float run(long steps, float a, float b) {
  vector x[CHAINS];
  for (int i = 0; i < CHAINS; ++i) x[i] = (vector){} + (float)i;
  for (long step = 0; step < steps; ++step)
    for (int i = 0; i < CHAINS; ++i) x[i] = x[i] * a + b;
  vector sum = x[0];
  for (int i = 1; i < CHAINS; ++i) sum += x[i];
  return sum[0];
}
