// SPDX-License-Identifier: Apache-2.0
// A hook: a program of the admin's, run for a source or for an event. What it is run with, how it
// ended, and the seam by which the reconciler runs it.

internal import SystemIO

/// What a hook is run with.
struct HookCall: Sendable {
  /// Path of the program.
  var program: String
  var arguments: [String]
  /// What it has in its environment beside the usual, by name.
  var environment: [String: String] = [:]
  /// What it reads from its standard input; nil: nothing.
  var input: String?
  /// How long it may take.
  var deadline: Duration
  /// Path of the run's files, without their suffixes. No two runs have it at one time; what an
  /// earlier run of it has left, perhaps one of an earlier daemon, is ended first.
  var files: String
}

/// How a hook's run ended.
struct HookOutcome: Sendable, Equatable {
  /// How its process ended; nil: it did not in time, and was killed.
  var status: ExitStatus?
  /// What it wrote on standard output.
  var output = ""
  /// The lines on standard error, the last ones if there were many.
  var complaints: [String] = []

  /// Whether it did what it was asked to.
  var isGood: Bool { status == .exited(0) }
}

/// Runs hooks. Calls block, and may come from any thread.
protocol HookRunning: Sendable {
  /// Runs one to its end. Throws: the errno with which it could not be started, and EBUSY when an
  /// earlier run under the same name cannot be ended.
  func run(_ call: HookCall) throws(IOError) -> HookOutcome
}

/// What a hook's `attach` has printed.
struct AttachedSource: Sendable, Equatable {
  /// Path of the block device or file.
  var path: String
  /// Whether other hosts can open it.
  var isShared = false

  /// Reads what was printed: a path, and on further lines `shared` or `local`. Throws the line that
  /// makes no sense, "" for none at all.
  init(_ output: String) throws(Senseless) {
    let lines = output.split(separator: "\n").map { $0.trimmingSpaces }.filter { !$0.isEmpty }
    guard let first = lines.first else { throw Senseless(line: "") }
    guard first.hasPrefix("/"), first.utf8.count <= Spec.longestPath,
      !first.unicodeScalars.contains(where: { $0.value < 0x20 || $0.value == 0x7F })
    else { throw Senseless(line: first) }
    path = first
    for line in lines.dropFirst() {
      switch line {
      case "shared": isShared = true
      case "local": isShared = false
      default: throw Senseless(line: line)
      }
    }
  }

  /// A line that is none of those.
  struct Senseless: Error, Equatable { let line: String }
}

extension Substring {
  /// Without blanks at its ends.
  fileprivate var trimmingSpaces: String {
    var text = self
    while text.first?.isWhitespace == true { text.removeFirst() }
    while text.last?.isWhitespace == true { text.removeLast() }
    return String(text)
  }
}
