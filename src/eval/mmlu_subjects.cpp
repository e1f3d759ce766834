#include "eval/mmlu_subjects.h"

#include <algorithm>
#include <array>

namespace sagelm {
namespace {

using enum MmluCategory;

constexpr std::array kSubjects = {
    MmluSubjectInfo{"abstract_algebra", kStem},
    MmluSubjectInfo{"anatomy", kStem},
    MmluSubjectInfo{"astronomy", kStem},
    MmluSubjectInfo{"business_ethics", kOther},
    MmluSubjectInfo{"clinical_knowledge", kOther},
    MmluSubjectInfo{"college_biology", kStem},
    MmluSubjectInfo{"college_chemistry", kStem},
    MmluSubjectInfo{"college_computer_science", kStem},
    MmluSubjectInfo{"college_mathematics", kStem},
    MmluSubjectInfo{"college_medicine", kOther},
    MmluSubjectInfo{"college_physics", kStem},
    MmluSubjectInfo{"computer_security", kStem},
    MmluSubjectInfo{"conceptual_physics", kStem},
    MmluSubjectInfo{"econometrics", kSocialSciences},
    MmluSubjectInfo{"electrical_engineering", kStem},
    MmluSubjectInfo{"elementary_mathematics", kStem},
    MmluSubjectInfo{"formal_logic", kHumanities},
    MmluSubjectInfo{"global_facts", kOther},
    MmluSubjectInfo{"high_school_biology", kStem},
    MmluSubjectInfo{"high_school_chemistry", kStem},
    MmluSubjectInfo{"high_school_computer_science", kStem},
    MmluSubjectInfo{"high_school_european_history", kHumanities},
    MmluSubjectInfo{"high_school_geography", kSocialSciences},
    MmluSubjectInfo{"high_school_government_and_politics", kSocialSciences},
    MmluSubjectInfo{"high_school_macroeconomics", kSocialSciences},
    MmluSubjectInfo{"high_school_mathematics", kStem},
    MmluSubjectInfo{"high_school_microeconomics", kSocialSciences},
    MmluSubjectInfo{"high_school_physics", kStem},
    MmluSubjectInfo{"high_school_psychology", kSocialSciences},
    MmluSubjectInfo{"high_school_statistics", kStem},
    MmluSubjectInfo{"high_school_us_history", kHumanities},
    MmluSubjectInfo{"high_school_world_history", kHumanities},
    MmluSubjectInfo{"human_aging", kOther},
    MmluSubjectInfo{"human_sexuality", kSocialSciences},
    MmluSubjectInfo{"international_law", kHumanities},
    MmluSubjectInfo{"jurisprudence", kHumanities},
    MmluSubjectInfo{"logical_fallacies", kHumanities},
    MmluSubjectInfo{"machine_learning", kStem},
    MmluSubjectInfo{"management", kOther},
    MmluSubjectInfo{"marketing", kOther},
    MmluSubjectInfo{"medical_genetics", kOther},
    MmluSubjectInfo{"miscellaneous", kOther},
    MmluSubjectInfo{"moral_disputes", kHumanities},
    MmluSubjectInfo{"moral_scenarios", kHumanities},
    MmluSubjectInfo{"nutrition", kOther},
    MmluSubjectInfo{"philosophy", kHumanities},
    MmluSubjectInfo{"prehistory", kHumanities},
    MmluSubjectInfo{"professional_accounting", kOther},
    MmluSubjectInfo{"professional_law", kHumanities},
    MmluSubjectInfo{"professional_medicine", kOther},
    MmluSubjectInfo{"professional_psychology", kSocialSciences},
    MmluSubjectInfo{"public_relations", kSocialSciences},
    MmluSubjectInfo{"security_studies", kSocialSciences},
    MmluSubjectInfo{"sociology", kSocialSciences},
    MmluSubjectInfo{"us_foreign_policy", kSocialSciences},
    MmluSubjectInfo{"virology", kOther},
    MmluSubjectInfo{"world_religions", kHumanities},
};
static_assert(kSubjects.size() == 57);
static_assert(std::ranges::is_sorted(kSubjects, {}, &MmluSubjectInfo::name));

}  // namespace

std::span<const MmluSubjectInfo> mmlu_subjects() { return kSubjects; }

const MmluSubjectInfo* find_mmlu_subject(std::string_view name) {
  const auto found = std::ranges::lower_bound(kSubjects, name, {}, &MmluSubjectInfo::name);
  return found != kSubjects.end() && found->name == name ? &*found : nullptr;
}

std::string_view mmlu_category_name(MmluCategory category) {
  constexpr std::array<std::string_view, kNumMmluCategories> kNames = {"STEM", "humanities",
                                                                       "social sciences", "other"};
  return kNames[static_cast<size_t>(category)];
}

}  // namespace sagelm
