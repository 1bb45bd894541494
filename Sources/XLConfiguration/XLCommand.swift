// SPDX-License-Identifier: Apache-2.0
// The commands of xl that read disk lines: where in their arguments these stand.

/// The arguments of a call of xl, without the program's name.
package struct XLCommand: Sendable {
  /// What an argument is.
  package enum Part: Sendable, Hashable {
    /// A guest's configuration file.
    case file
    /// Text that is appended to the configuration: `disk=[…]`.
    case setting
    /// An option's word with the file behind it, `--defconfig=FILE`: so many bytes before the file.
    case option(Int)
  }

  /// The places of what has to be looked at.
  package private(set) var parts: [(index: Int, part: Part)] = []
  /// Of `block-attach`: the places of the arguments that are one disk line together.
  package private(set) var line: Range<Int>?

  /// Finds them. xl takes the names of its commands cut short as long as they are clear; what is
  /// not clear is refused by xl itself.
  /// Source: xl.c, xl_cmdtable.c and the commands' own getopt strings.
  package init(_ arguments: [String]) {
    // Options of xl itself have no values.
    guard let command = arguments.firstIndex(where: { !$0.hasPrefix("-") }),
      let known = Known.all.first(where: { $0.name.hasPrefix(arguments[command]) })
    else { return }
    var operands: [Int] = []
    var named: (index: Int, part: Part)?
    var index = command + 1
    var areOptions = true
    while index < arguments.count {
      defer { index += 1 }
      let word = arguments[index]
      guard areOptions, word.hasPrefix("-"), word != "-" else {
        operands.append(index)
        continue
      }
      if word == "--" {
        areOptions = false
      } else if word.hasPrefix("--") {
        let name = word.dropFirst(2).prefix { $0 != "=" }
        guard known.words.contains(String(name)) else { continue }
        let holdsValue = word.contains("=")
        if !holdsValue { index += 1 }
        guard known.files.contains(String(name)) else { continue }
        named = holdsValue ? (index, .option(name.utf8.count + 3)) : (index, .file)
      } else if let place = word.dropFirst().firstIndex(where: { known.letters.contains($0) }) {
        // A letter's value is the rest of the word, or the next word.
        let letter = String(word[place])
        let rest = word[word.index(after: place)...]
        if rest.isEmpty { index += 1 }
        guard known.files.contains(letter) else { continue }
        named = rest.isEmpty ? (index, .file) : (index, .option(word.utf8.count - rest.utf8.count))
      }
    }
    take(known, operands, arguments, named.flatMap { $0.index < arguments.count ? $0 : nil })
  }

  private mutating func take(
    _ known: Known, _ operands: [Int], _ arguments: [String], _ named: (index: Int, part: Part)?
  ) {
    if let named { parts.append(named) }
    switch known.operands {
    case .configuration, .configurationAfterDomain:
      for index in known.operands == .configuration ? operands[...] : operands.dropFirst() {
        if arguments[index].contains("=") {
          parts.append((index, .setting))
        } else if !parts.contains(where: { $0.part != .setting }) {
          parts.append((index, .file))
        }
      }
    case .configurationBefore:
      // CONFIGURATION FILE, or FILE alone.
      if operands.count > 1, named == nil { parts.append((operands[0], .file)) }
    case .configurationThird:
      if operands.count > 2 { parts.append((operands[2], .file)) }
    case .disk:
      // The options of block-attach stand before the domain.
      if operands.count > 1 { line = operands[1]..<arguments.count }
    case .none: break
    }
  }

  /// A command that reads disk lines.
  private struct Known: Sendable {
    enum Operands {
      /// Both settings and a file, if no option has it.
      case configuration, configurationAfterDomain
      /// CONFIGURATION FILE.
      case configurationBefore
      /// DOMAIN FILE CONFIGURATION.
      case configurationThird
      /// DOMAIN LINE…
      case disk
      case none
    }
    let name: String
    let operands: Operands
    /// Letters of options with values.
    let letters: Set<Character>
    /// Long options with values.
    let words: Set<String>
    /// Options of both kinds whose value is a configuration file.
    let files: Set<String>

    static let all = [
      Known(
        name: "create", operands: .configuration, letters: ["f"], words: ["defconfig"],
        files: ["f", "defconfig"]),
      Known(
        name: "config-update", operands: .configurationAfterDomain, letters: ["f"],
        words: ["defconfig"], files: ["f", "defconfig"]),
      Known(name: "restore", operands: .configurationBefore, letters: [], words: [], files: []),
      Known(
        name: "migrate", operands: .none, letters: ["C", "s"], words: [], files: ["C"]),
      Known(name: "save", operands: .configurationThird, letters: [], words: [], files: []),
      Known(name: "block-attach", operands: .disk, letters: [], words: [], files: []),
    ]
  }
}
