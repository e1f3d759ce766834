// The subcommands. Each add_ function registers one with its own flags; the work is done in the
// subcommand's callback, which throws sagelm::UsageError or sagelm::Error (main.cpp turns them into
// exit status 2 and 1).
#pragma once

#include <CLI/App.hpp>

namespace sagelm::cli {

void add_chat(CLI::App& app);
void add_generate(CLI::App& app);
void add_perplexity(CLI::App& app);
void add_lambada(CLI::App& app);
void add_mmlu(CLI::App& app);
void add_compare(CLI::App& app);
void add_bench(CLI::App& app);
void add_calibrate(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_info(CLI::App& app);

// Of bench.
void add_bench_attention(CLI::App& bench);

}  // namespace sagelm::cli
