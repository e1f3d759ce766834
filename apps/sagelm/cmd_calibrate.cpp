// sagelm calibrate: chooses each layer's kernel for --attention sage-adaptive, on a text of the
// user's own if there is one.
#include <spdlog/fmt/fmt.h>

#include <filesystem>
#include <memory>
#include <string>

#include "adaptive.h"
#include "base/error.h"
#include "commands.h"
#include "json_output.h"
#include "options.h"
#include "sagelm/sagelm.hpp"

namespace sagelm::cli {
namespace {

struct CalibrateFlags {
  CommonOptions common;
  std::string file;
  int64_t windows = 4;
  double threshold = kAdaptiveThreshold;
};

void run_calibrate(const CalibrateFlags& flags, bool has_file) {
  if (!(flags.threshold >= 0 && flags.threshold <= 1)) {  // nor NaN
    fail_usage("--threshold is a cosine similarity from 0 to 1, not {}", flags.threshold);
  }
  ResultOutput output(flags.common.json);
  Model model = load_model(before_choice(flags.common));
  const std::filesystem::path file =
      calibration_file(flags.common, calibration_key(flags.common, model.info()));
  if (file.empty()) {
    fail(
        "neither XDG_CACHE_HOME nor HOME names a directory: say with --calibration where to write");
  }
  const Calibration calibration =
      calibrate(model, flags.common,
                has_file ? text_of_file(model, flags.file, flags.windows) : built_in_text(model),
                flags.threshold);
  save_calibration(calibration, file);
  model.set_attention(calibration.attention(), !flags.common.no_smooth_k, flags.common.kv_cache);
  const ModelInfo info = model.info();
  output.text(fmt::format("{:<28}{}\n{:<28}{}\n{:<28}{}\n", "attention", info.attention,
                          "type of the KV cache", info.kv_cache, "device", info.device));
  output.text(describe_calibration(calibration, file));
  Json result = Json::parse(calibration_json(calibration));
  result["attention"] = info.attention;
  result["device"] = info.device;
  result["file"] = file.string();
  output.json(result);
}

}  // namespace

void add_calibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate", "Choose the attention kernel of each layer for --attention sage-adaptive");
  auto flags = std::make_shared<CalibrateFlags>();
  add_common_options(*command, flags->common,
                     kModelGroup | kCalibrationGroup | kDeviceGroup | kJsonGroup | kVerboseGroup);
  flags->common.attention = kAdaptive;
  command->add_flag("--no-smooth-k", flags->common.no_smooth_k,
                    "for runs with --no-smooth-k: quantize K as it is");
  command->add_option("--kv-cache", flags->common.kv_cache, "for runs with this --kv-cache")
      ->option_text("auto|fp16|int8|int4 (default: auto)")
      ->check(CLI::IsMember({"auto", "fp16", "int8", "int4"}));
  const CLI::Option* file =
      command->add_option("--file", flags->file, "the text to measure on; -: standard input")
          ->option_text("FILE (default: a built-in text)")
          ->check(not_empty);
  command
      ->add_option("--windows", flags->windows,
                   fmt::format("its first N windows of {} tokens", kProbedTokens))
      ->option_text("N (default: 4)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->needs(command->get_option("--file"));
  command
      ->add_option("--threshold", flags->threshold,
                   "cosine similarity with exact attention that a layer needs at least")
      ->option_text(fmt::format("C (default: {})", kAdaptiveThreshold))
      ->check(not_empty);
  command->callback([flags, file] { run_calibrate(*flags, file->count() > 0); });
}

}  // namespace sagelm::cli
