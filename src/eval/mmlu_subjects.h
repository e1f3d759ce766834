// The 57 subjects of MMLU (Hendrycks et al., arXiv:2009.03300) and their four categories.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace sagelm {

enum class MmluCategory : uint8_t { kStem, kHumanities, kSocialSciences, kOther };
inline constexpr int kNumMmluCategories = 4;

struct MmluSubjectInfo {
  std::string_view name;  // as in file names: "abstract_algebra"
  MmluCategory category = MmluCategory::kOther;
};

// In alphabetical order, grouped as in lm-evaluation-harness: 19 STEM, 13 humanities, 12 social
// sciences, 13 other. (The paper's own table has anatomy under "other".)
std::span<const MmluSubjectInfo> mmlu_subjects();

// nullptr if there is none of that name.
const MmluSubjectInfo* find_mmlu_subject(std::string_view name);

std::string_view mmlu_category_name(MmluCategory category);  // "STEM", "social sciences", …

}  // namespace sagelm
