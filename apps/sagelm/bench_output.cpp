#include "bench_output.h"

#include <spdlog/fmt/fmt.h>

namespace sagelm::cli {

double percent(double value, double of) { return of > 0 ? 100 * value / of : 0; }

Json spread_json(const Spread& spread) {
  return {{"median", spread.median}, {"smallest", spread.smallest}, {"largest", spread.largest}};
}

Json ceilings_json(const Ceilings& ceilings) {
  const auto rate = [](double value, double unit) {
    return value > 0 ? Json(value / unit) : Json();
  };
  return {{"copy_gb_per_s", rate(ceilings.copy_bytes, 1e9)},
          {"half_tflops", rate(ceilings.half_ops, 1e12)},
          {"int8_tops", rate(ceilings.int8_ops, 1e12)},
          {"fp8_tflops", rate(ceilings.fp8_ops, 1e12)}};
}

std::string describe_ceilings(const Ceilings& ceilings) {
  std::string text =
      fmt::format("ceilings: copy {:.1f} GB/s (read + written), large products {:.4g} TFLOPS",
                  ceilings.copy_bytes * 1e-9, ceilings.half_ops * 1e-12);
  if (ceilings.int8_ops > 0) text += fmt::format(", INT8 {:.1f}", ceilings.int8_ops * 1e-12);
  if (ceilings.fp8_ops > 0) text += fmt::format(", FP8 {:.1f}", ceilings.fp8_ops * 1e-12);
  return text + "\n";
}

void add_number_list(CLI::App& command, const std::string& name, std::vector<int64_t>& values,
                     const std::string& help, const std::string& default_text) {
  command.add_option(name, values, help)
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->option_text("LIST (default: " + default_text + ")");
}

void add_attention_list(CLI::App& command, std::vector<std::string>& names) {
  command.add_option("--attention", names, "attention kernels to measure")
      ->delimiter(',')
      ->option_text("LIST (default: " + fmt::format("{}", fmt::join(names, ",")) + ")");
}

void add_rest(CLI::App& command, std::optional<double>& seconds, const std::string& help,
              const std::string& default_text) {
  // Not CLI::Range, which lets NaN pass.
  const auto check = [](const std::string& text) {
    constexpr double kMost = 60;
    double value = 0;
    const bool fits = CLI::detail::lexical_cast(text, value) && value >= 0 && value <= kMost;
    return fits ? std::string() : fmt::format("{} is not from 0 to {} seconds", text, kMost);
  };
  command.add_option("--rest", seconds, help)
      ->option_text("SECONDS (default: " + default_text + ")")
      ->check(check);
}

}  // namespace sagelm::cli
