// SPDX-License-Identifier: Apache-2.0
// dmu-xl: xl, for configurations and commands with disk lines as xm had them. What these mean is in
// XLConfiguration; this reads the files that the arguments name, and becomes xl.

import ArgumentParser
import Glibc
import SystemIO
import XLConfiguration

/// dmu-xl.
package enum Program {
  /// Runs the program with the arguments of this process.
  package static func main() {
    let arguments = Array(CommandLine.arguments.dropFirst())
    // What begins with one of these is for us; all else is xl's.
    let ours = [
      "-h", "--help", "--version", "--generate-completion-script", "---completion",
      "--experimental-dump-help",
    ]
    if let first = arguments.first, ours.contains(where: { first.hasPrefix($0) }) {
      DmuXl.main(arguments)
    } else {
      DmuXl.becomeXL(arguments)
    }
  }
}

struct DmuXl: ParsableCommand {
  static let configuration = CommandConfiguration(
    commandName: "dmu-xl",
    abstract: "Calls xl, which then takes dmu disk lines as xm had them.",
    discussion: """
      In a guest's configuration, in disk=[…] on the command line and in block-attach a line that \
      begins with 'dmu:' and names no script,

        disk = [ "dmu:dscow:/srv/web.dscow:/dev/vg/base,xvda,w" ]

      is given to xl with script=block-dmu and target=. Everything else reaches xl as it is, and the \
      exit status is xl's. See dmu-xl(1).
      """,
    version: Version.text)

  @Argument(
    parsing: .allUnrecognized, help: "A command of xl and its arguments.",
    completion: .file())
  var arguments: [String] = []

  func run() { Self.becomeXL(arguments) }

  /// Exit status 126: xl could not be started.
  static func becomeXL(_ arguments: [String]) -> Never {
    var words = arguments
    let command = XLCommand(arguments)
    for (index, part) in command.parts { words[index] = rewritten(words[index], part) }
    if let line = command.line,
      let disk = PositionalLine(words[line].joined(separator: ","))
    {
      words.replaceSubrange(line, with: [disk.rewritten])
    }
    give(up: "\(ProgramName.become(["xl"] + words))")
  }

  /// An argument with dmu lines as xl takes them: of a file with such lines, a file in memory.
  private static func rewritten(_ word: String, _ part: XLCommand.Part) -> String {
    switch part {
    case .setting:
      guard let text = GuestConfiguration.rewritten(Array(word.utf8)) else { return word }
      return String(decoding: text, as: UTF8.self)
    case .file: return file(word) ?? word
    case .option(let count):
      let utf8 = word.utf8
      let border = utf8.index(utf8.startIndex, offsetBy: count)
      return file(String(word[border...])).map { word[..<border] + $0 } ?? word
    }
  }

  /// A path of a configuration's text as xl takes it; nil when the file can stay, as one that cannot
  /// be read does: xl says why. What xl takes is a regular file, and nothing reads it later: a reboot
  /// goes by what the toolstack has kept.
  private static func file(_ path: String) -> String? {
    guard let text = text(of: path), let result = GuestConfiguration.rewritten(text) else {
      return nil
    }
    do throws(IOError) {
      let memory = try Descriptor(sealedMemory: UInt64(result.count), name: path)
      var done = 0
      while done < result.count {
        let count = result.withUnsafeBytes {
          write(memory.raw, $0.baseAddress! + done, $0.count - done)
        }
        if count < 0, errno == EINTR { continue }
        guard count > 0 else { throw IOError.last("copy", path) }
        done += count
      }
      guard fcntl(memory.raw, F_SETFD, 0) == 0 else { throw IOError.last("keep open", path) }
      return "/proc/self/fd/\(memory.release())"
    } catch { give(up: "\(error)") }
  }

  private static func text(of path: String) -> [UInt8]? {
    guard let file = try? Descriptor(path: path, flags: O_RDONLY | O_NONBLOCK) else { return nil }
    var status = stat()
    guard fstat(file.raw, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return nil }
    var text: [UInt8] = []
    var buffer = [UInt8](repeating: 0, count: 16384)
    while true {
      let count = read(file.raw, &buffer, buffer.count)
      if count < 0, errno == EINTR { continue }
      guard count >= 0 else { return nil }
      if count == 0 { return text }
      text += buffer[..<count]
    }
  }

  private static func give(up reason: String) -> Never {
    let message = Array("dmu-xl: \(reason)\n".utf8)
    // Nobody is left to report to when stderr fails.
    _ = write(2, message, message.count)
    Glibc.exit(126)
  }
}
