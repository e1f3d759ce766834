// The sagelm program: parses the command line, runs one subcommand, and turns errors into one
// sentence and an exit status (0 done, 1 failed, 2 wrong usage).
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <new>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/utf8.h"
#include "commands.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;

int report(const std::string& message, int status) {
  std::cerr << "sagelm: error: " << sagelm::printable(message) << '\n';
  return status;
}

int run(int argc, char** argv) {
  CLI::App app("SageLM runs Llama-style language models with quantized attention", "sagelm");
  app.set_version_flag("--version", "sagelm " SAGELM_VERSION);
  app.require_subcommand(1);
  sagelm::cli::add_chat(app);
  sagelm::cli::add_generate(app);
  sagelm::cli::add_perplexity(app);
  sagelm::cli::add_lambada(app);
  sagelm::cli::add_mmlu(app);
  sagelm::cli::add_compare(app);
  sagelm::cli::add_bench(app);
  sagelm::cli::add_calibrate(app);
  sagelm::cli::add_tokenize(app);
  sagelm::cli::add_info(app);
  if (argc <= 1) {
    std::cout << app.help();
    return kWrongUsage;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {
      app.exit(error);  // --help, --version
      return 0;
    }
    std::string message = error.what();
    std::string command;
    const CLI::App* at = &app;
    while (!at->get_subcommands().empty()) {
      at = at->get_subcommands().front();
      command += " " + at->get_name();
    }
    if (!command.empty()) {
      const std::vector<std::string> rest = at->remaining();
      if (at->get_require_subcommand_min() > 0 && !rest.empty()) {
        message = fmt::format("there is no '{}' in sagelm{}", rest.front(), command);
      }
      message += " (see sagelm" + command + " --help)";
    } else {
      message =
          fmt::format("there is no {} '{}'", argv[1][0] == '-' ? "option" : "command", argv[1]);
      message += " (see sagelm --help)";
    }
    return report(message, kWrongUsage);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // a closed pipe is a write error like any other
  try {
    const int status = run(argc, argv);
    std::cout.flush();
    if (!std::cout || std::fflush(stdout) != 0) {
      return report("cannot write to standard output", kFailed);
    }
    return status;
  } catch (const sagelm::UsageError& error) {
    return report(error.what(), kWrongUsage);
  } catch (const std::bad_alloc&) {
    return report("out of memory", kFailed);
  } catch (const std::exception& error) {
    return report(error.what(), kFailed);
  }
}
