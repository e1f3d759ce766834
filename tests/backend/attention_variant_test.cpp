#include "backend/attention_variant.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace sagelm {
namespace {

TEST(AttentionVariant, EveryNameParsesToItself) {
  for (const auto variant :
       {AttentionVariant::kFp16, AttentionVariant::kSage1, AttentionVariant::kSage1T,
        AttentionVariant::kSage1B, AttentionVariant::kSage1VT, AttentionVariant::kSage1VB,
        AttentionVariant::kSage2_8b, AttentionVariant::kSage2_4b}) {
    EXPECT_EQ(parse_attention_variant(attention_variant_name(variant)), variant);
  }
}

TEST(AttentionVariant, AliasesNameThePublishedDefaults) {
  EXPECT_EQ(parse_attention_variant("sage2"), AttentionVariant::kSage2_8b);
  EXPECT_EQ(parse_attention_variant("sage"), AttentionVariant::kSage2_8b);
}

TEST(AttentionVariant, UnknownNamesAreRefusedWithTheList) {
  for (const char* name : {"", "FP16", "sage3", "sage2 "}) {
    try {
      parse_attention_variant(name);
      FAIL() << name;
    } catch (const UsageError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("fp16"), std::string::npos) << text;
      EXPECT_NE(text.find("sage2-4b"), std::string::npos) << text;
    }
  }
}

TEST(AttentionVariant, DescriptionSaysWhatRuns) {
  EXPECT_EQ(describe_attention({AttentionVariant::kSage2_8b, true}),
            "sage2-8b (INT8 QK per thread, FP8 e4m3 PV two-level, smoothed K)");
  EXPECT_EQ(describe_attention({AttentionVariant::kSage1B, false}),
            "sage1-b (INT8 QK per block, FP16 PV, K not smoothed)");
  EXPECT_EQ(describe_attention({AttentionVariant::kFp16, true}),
            "fp16 (FP16 QK and PV, FP32 softmax and accumulation)");
}

TEST(AttentionVariant, OneNameIsForAllLayersAndSeveralAreForOneEach) {
  const AttentionSpec sage2{AttentionVariant::kSage2_8b, false};
  const AttentionSpec fp16{AttentionVariant::kFp16, false};
  EXPECT_EQ(parse_layer_attention("sage2", 3, false), std::vector(3, sage2));
  EXPECT_EQ(parse_layer_attention("sage2/fp16/sage2-8b", 3, false),
            (std::vector{sage2, fp16, sage2}));
  for (const char* names : {"sage2/fp16", "sage2/fp16/fp16/fp16", "sage2//fp16", "/", "a/b/c"}) {
    EXPECT_THROW(parse_layer_attention(names, 3, true), UsageError) << names;
  }
}

TEST(AttentionVariant, DescriptionSaysWhichLayersHaveWhich) {
  EXPECT_EQ(describe_layer_attention(parse_layer_attention("fp16", 4, true)),
            describe_attention({AttentionVariant::kFp16, true}));
  EXPECT_EQ(
      describe_layer_attention(parse_layer_attention("sage2/sage2/fp16/sage1/sage2", 5, true)),
      "fp16 in layer 2; sage1 in layer 3; sage2-8b in layers 0-1, 4 (smoothed K)");
  EXPECT_EQ(describe_layer_attention(parse_layer_attention("sage2/fp16", 2, false)),
            "fp16 in layer 1; sage2-8b in layer 0 (K not smoothed)");
}

}  // namespace
}  // namespace sagelm
