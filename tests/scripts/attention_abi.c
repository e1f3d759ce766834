/* Prints how this compiler lays out the structs of the C interface: "struct.field offset size". */
#include <stdio.h>

#include "sagelm/attention.h"

#define FIELD(type, field)                                                        \
  printf(#type "." #field " %zu %zu\n", offsetof(sagelm_attention_##type, field), \
         sizeof(((sagelm_attention_##type*)0)->field))

int main(void) {
  FIELD(tensor, data);
  FIELD(tensor, batch_stride);
  FIELD(tensor, token_stride);
  FIELD(tensor, head_stride);
  printf("tensor 0 %zu\n", sizeof(sagelm_attention_tensor));

  FIELD(args, struct_size);
  FIELD(args, variant);
  FIELD(args, dtype);
  FIELD(args, kernel);
  FIELD(args, batch);
  FIELD(args, num_heads);
  FIELD(args, num_kv_heads);
  FIELD(args, head_dim);
  FIELD(args, max_q_len);
  FIELD(args, max_kv_len);
  FIELD(args, causal);
  FIELD(args, no_smooth_k);
  FIELD(args, softmax_scale);
  FIELD(args, q);
  FIELD(args, k);
  FIELD(args, v);
  FIELD(args, out);
  FIELD(args, lse);
  FIELD(args, cu_q_lens);
  FIELD(args, cu_kv_lens);
  FIELD(args, kv_lens);
  FIELD(args, page_table);
  FIELD(args, page_table_stride);
  FIELD(args, page_tokens);
  FIELD(args, workspace);
  FIELD(args, workspace_bytes);
  FIELD(args, stream);
  printf("args 0 %zu\n", sizeof(sagelm_attention_args));

  printf("fp16 %d 0\nsage1 %d 0\nsage2 %d 0\nf16 %d 0\nbf16 %d 0\nok %d 0\n", SAGELM_ATTENTION_FP16,
         SAGELM_ATTENTION_SAGE1, SAGELM_ATTENTION_SAGE2, SAGELM_ATTENTION_F16,
         SAGELM_ATTENTION_BF16, SAGELM_ATTENTION_OK);
  return 0;
}
