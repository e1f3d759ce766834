#include "eval/calibration.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/calibration_text.h"
#include "support/error_of.h"

namespace sagelm {
namespace {

namespace fs = std::filesystem;

const std::vector<std::string> kCandidates = {"fast", "middle", "safe"};

std::vector<AttentionError> errors_of(const std::vector<double>& cosines) {
  std::vector<AttentionError> errors;
  for (const double cosine : cosines) errors.push_back({.cosine = cosine});
  return errors;
}

TEST(Calibration, EveryLayerGetsTheFirstCandidateThatIsCloseEnough) {
  std::vector<std::string> measured;
  const auto layers = choose_attention(kCandidates, 4, 0.998, [&](const std::string& candidate) {
    measured.push_back(candidate);
    return candidate == "fast" ? errors_of({0.999, 0.998, 0.9979, std::nan("")})
                               : errors_of({0.1, 0.1, 0.9999, 0.5});
  });
  EXPECT_EQ(measured, (std::vector<std::string>{"fast", "middle"}));  // the last one never is
  ASSERT_EQ(layers.size(), 4u);
  EXPECT_EQ(layers[0].attention, "fast");
  EXPECT_EQ(layers[1].attention, "fast");
  EXPECT_EQ(layers[2].attention, "middle");
  EXPECT_EQ(layers[3].attention, "safe");
  EXPECT_EQ(layers[2].cosines, (std::vector<double>{0.9979, 0.9999}));
}

TEST(Calibration, MeasuresNoMoreThanItNeeds) {
  int measured = 0;
  const auto all = choose_attention(kCandidates, 2, 0.998, [&](const std::string&) {
    ++measured;
    return errors_of({1, 1});
  });
  EXPECT_EQ(measured, 1);
  EXPECT_EQ(all[1].attention, "fast");
  const std::vector<std::string> one = {"safe"};
  const auto only = choose_attention(one, 2, 0.998, [&](const std::string&) {
    ++measured;
    return errors_of({1, 1});
  });
  EXPECT_EQ(measured, 1);
  EXPECT_EQ(only[0].attention, "safe");
  EXPECT_THROW(
      choose_attention(kCandidates, 2, 0.998, [](const std::string&) { return errors_of({1}); }),
      Error);
}

Calibration example() {
  return {.key = {.model_hash = std::string(64, 'a'),
                  .candidates = kCandidates,
                  .smooth_k = true,
                  .kv_cache = "auto"},
          .model = "llama",
          .threshold = 0.998,
          .text = "built-in",
          .text_sha256 = std::string(64, 'b'),
          .tokens = 1234,
          .layers = {{.attention = "fast", .cosines = {0.9991}},
                     {.attention = "safe", .cosines = {0.5, std::nan("")}}}};
}

TEST(Calibration, AFileGivesBackWhatWasWritten) {
  const fs::path directory =
      fs::temp_directory_path() / ("sagelm_calibration_" + std::to_string(::getpid()));
  const fs::path file = directory / "new" / "calibration.json";
  const Calibration written = example();
  save_calibration(written, file);
  save_calibration(written, file);  // over the old one
  EXPECT_EQ(std::distance(fs::directory_iterator(file.parent_path()), fs::directory_iterator()), 1);
  std::ifstream stream(file);
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  const Calibration read = parse_calibration(bytes, file.string());
  EXPECT_EQ(read.attention(), "fast/safe");
  EXPECT_EQ(calibration_mismatch(read, written.key, 2), "");
  EXPECT_EQ(calibration_json(read), calibration_json(written));
  EXPECT_TRUE(std::isnan(read.layers[1].cosines[1]));
  const std::string refused =
      error_of([&] { save_calibration(written, file / "below" / "a file"); });
  EXPECT_NE(refused.find("cannot write the calibration"), std::string::npos) << refused;
  fs::remove_all(directory);
}

TEST(Calibration, AnotherModelDeviceOrSettingDoesNotFit) {
  const Calibration made = example();
  const auto mismatch = [&](auto change) {
    CalibrationKey key = made.key;
    change(key);
    return calibration_mismatch(made, key, 2);
  };
  const auto holds = [](const std::string& text, const char* part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  holds(mismatch([](CalibrationKey& key) { key.model_hash = std::string(64, 'c'); }),
        "another model, llama (hash aaaaaaaaaaaa, and this one has cccccccccccc)");
  holds(mismatch([](CalibrationKey& key) {
          key.candidates = {"fast", "safe"};
        }),
        "it chose from fast, middle, safe, and this device has fast, safe");
  holds(mismatch([](CalibrationKey& key) { key.smooth_k = false; }), "without --no-smooth-k");
  holds(mismatch([](CalibrationKey& key) { key.kv_cache = "fp16"; }), "--kv-cache auto, not fp16");
  holds(calibration_mismatch(made, made.key, 3), "2 layers, and the model 3");
  Calibration foreign = made;
  foreign.layers[0].attention = "bogus";
  holds(calibration_mismatch(foreign, made.key, 2), "bogus");
}

TEST(Calibration, ForeignBytesAreOneSentence) {
  const std::string good = calibration_json(example());
  for (const std::string& bytes :
       {std::string(), std::string("["), std::string("[]"), std::string("{}"),
        std::string(R"({"format": 3, "version": 1})"), good.substr(0, good.size() / 2),
        R"({"format": "sagelm-calibration", "version": 2})" + std::string(),
        R"({"format": "sagelm-calibration", "version": 1})" + std::string()}) {
    const std::string message = error_of([&] { parse_calibration(bytes, "a.json"); });
    EXPECT_EQ(message.rfind("a.json: ", 0), 0u) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  std::string other_kind = good;
  other_kind.replace(other_kind.find("0.9991"), 6, "\"text\"");
  const std::string message = error_of([&] { parse_calibration(other_kind, "a.json"); });
  EXPECT_NE(message.find("of another kind"), std::string::npos) << message;
}

TEST(Calibration, TextsAreCutIntoWindows) {
  const std::vector<int32_t> ids = {10, 11, 12, 13, 14, 15, 16};
  using Windows = std::vector<std::vector<int32_t>>;
  EXPECT_EQ(calibration_windows(ids, 1, 4, 9), (Windows{{1, 10, 11, 12}, {1, 13, 14, 15}}));
  EXPECT_EQ(calibration_windows(ids, -1, 3, 1), (Windows{{10, 11, 12}}));
  EXPECT_EQ(calibration_windows(ids, 1, 100, 9), (Windows{{1, 10, 11, 12, 13, 14, 15, 16}}));
  EXPECT_EQ(calibration_windows({}, 1, 4, 9), Windows());
}

TEST(Calibration, BuiltInTextsAreLongEnoughToSay) {
  EXPECT_GE(calibration_texts().size(), 3u);
  for (const std::string_view text : calibration_texts()) EXPECT_GT(text.size(), 900u);
}

}  // namespace
}  // namespace sagelm
