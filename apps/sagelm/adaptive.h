// --attention sage-adaptive: where the choice of a kernel for each layer is kept, and how it is
// made where there is none yet.
#pragma once

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "eval/calibration.h"
#include "options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {

inline constexpr std::string_view kAdaptive = "sage-adaptive";

inline bool is_adaptive(const CommonOptions& options) { return options.attention == kAdaptive; }

// Throws UsageError if --calibration was given and none of the attentions is sage-adaptive.
void check_calibration_option(const CommonOptions& options,
                              std::span<const std::string> attentions);

// The options with an attention that every model can be loaded with, before a choice is made.
CommonOptions before_choice(const CommonOptions& options);

// What a choice for options and the model that info describes depends on. Reads the model's files.
CalibrationKey calibration_key(const CommonOptions& options, const ModelInfo& info);

// --calibration, else the file of that key in the user's cache directory ($XDG_CACHE_HOME/sagelm or
// ~/.cache/sagelm); empty if there is no such directory.
std::filesystem::path calibration_file(const CommonOptions& options, const CalibrationKey& key);

// The choice that is kept, if there is one. One in --calibration that does not hold is an Error;
// one in the cache directory is as good as none, which is said on stderr.
std::optional<Calibration> stored_calibration(const CommonOptions& options);

// Text that layers are measured on, as windows of ids.
struct CalibrationText {
  std::string name;
  std::string sha256;
  std::vector<std::vector<int32_t>> windows;
};
CalibrationText built_in_text(const Model& model);
// The first `limit` windows. Throws Error if the file holds no text.
CalibrationText text_of_file(const Model& model, const std::string& file, int64_t limit);

// Measures the candidates on text. The model is left with one of them.
Calibration calibrate(Model& model, const CommonOptions& options, const CalibrationText& text,
                      double threshold);

// A table of the layers, what was measured of each, and what that was made with.
std::string describe_calibration(const Calibration& calibration, const std::filesystem::path& file);

// options' attention as Model::set_attention takes it: of sage-adaptive the choice that is kept, or
// one that is made now and kept. In that case the model is left with another attention than before.
std::string resolve_attention(Model& model, const CommonOptions& options);

}  // namespace sagelm::cli
