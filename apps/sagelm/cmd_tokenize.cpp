// sagelm tokenize: the ids and pieces of a text. Reads the tokenizer only, no weights.
#include <memory>
#include <string>

#include "base/error.h"
#include "base/utf8.h"
#include "commands.h"
#include "json_output.h"
#include "options.h"
#include "text/tokenizer.h"

namespace sagelm::cli {
namespace {

struct TokenizeFlags {
  CommonOptions common;
  TextOption text;
  bool no_bos = false;
};

void run_tokenize(const TokenizeFlags& flags) {
  const std::string text = flags.text.read();
  ResultOutput output(flags.common.json);
  const Tokenizer tokenizer = open_tokenizer(flags.common);
  const bool bos = !flags.no_bos && tokenizer.add_bos_default();
  const std::vector<int32_t> ids = tokenizer.encode(text, bos);
  std::string table;
  Json pieces = Json::array();
  for (const int32_t id : ids) {
    const std::string& piece = tokenizer.piece(id);
    table += fmt::format("{}\t{}\n", id, printable(piece));
    pieces.push_back(piece);
  }
  output.text(table);
  output.json({{"ids", ids}, {"pieces", pieces}});
  if (flags.common.verbose) {
    fmt::print(stderr, "{} tokens, {} a beginning-of-sequence token ({})\n", ids.size(),
               bos ? "with" : "without",
               flags.no_bos ? "--no-bos" : "as the tokenizer's configuration says");
  }
}

}  // namespace

void add_tokenize(CLI::App& app) {
  CLI::App* command = app.add_subcommand("tokenize", "Show the token ids and pieces of a text");
  auto flags = std::make_shared<TokenizeFlags>();
  add_common_options(*command, flags->common, kModelGroup | kJsonGroup | kVerboseGroup);
  flags->text.add(*command, "--text", "the text");
  command->add_flag("--no-bos", flags->no_bos, "no beginning-of-sequence token before the text");
  command->callback([flags] { run_tokenize(*flags); });
}

}  // namespace sagelm::cli
