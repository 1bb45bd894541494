// SPDX-License-Identifier: Apache-2.0
// Reading the text that dmsetup takes and prints.

extension Table {
  /// Reads a table. Empty lines and lines that begin with # are passed over. Throws: the
  /// number of the line, the field, and what is wrong with it.
  package init(parsing text: String) throws(TableError) {
    var segments: [Segment] = []
    var next: UInt64 = 0
    let lines = text.split(omittingEmptySubsequences: false) { $0.isNewline }
    for (index, line) in lines.enumerated() {
      var fields = TableFields(line: index + 1, line)
      guard !fields.isEmpty, line.first(where: { !$0.isWhitespace }) != "#" else { continue }
      let segment = try Segment(parsing: &fields)
      try segment.validate(line: index + 1, expecting: next)
      next = segment.start + segment.length
      segments.append(segment)
    }
    try self.init(segments)
  }
}

extension Segment {
  /// Reads a line. The values are not yet validated.
  init(parsing fields: inout TableFields) throws(TableError) {
    let start: UInt64 = try fields.number("START")
    let length: UInt64 = try fields.number("LEN")
    let mapping = try Mapping(parsing: &fields)
    try fields.end()
    self.init(start: start, length: length, mapping)
  }
}

extension Mapping {
  /// Reads the name of a target and its parameters.
  init(parsing fields: inout TableFields) throws(TableError) {
    let name = try fields.word("TYPE")
    switch name {
    case "linear": self = .linear(try fields.location())
    case "error": self = .error
    case "zero": self = .zero
    case "striped":
      let count: UInt32 = try fields.number("STRIPES")
      let chunk: UInt32 = try fields.number("CHUNK")
      self = .striped(chunk: chunk, try fields.locations(Int(count)))
    case "mirror": self = .mirror(try Mirror(parsing: &fields))
    case "snapshot": self = .snapshot(try Snapshot(parsing: &fields))
    case "delay": self = .delay(try Delay(parsing: &fields))
    case "flakey": self = .flakey(try Flakey(parsing: &fields))
    case "userspace": self = .userspace(try Userspace(parsing: &fields))
    default:
      throw fields.fail(
        "TYPE",
        "'\(name)' is none of linear, error, zero, striped, mirror, snapshot, delay, flakey, "
          + "userspace")
    }
  }
}

extension TableFields {
  fileprivate mutating func locations(_ count: Int) throws(TableError) -> [Location] {
    var list: [Location] = []
    // Fails at the first word that is not there, however many were named.
    while list.count < count { list.append(try location(" \(list.count + 1)")) }
    return list
  }
}

extension Mirror {
  init(parsing fields: inout TableFields) throws(TableError) {
    let kind = try fields.word("LOG")
    guard kind == "core" || kind == "disk" else {
      throw fields.fail("LOG", "'\(kind)' is neither core nor disk")
    }
    let count = try fields.count("LOG ARGS", words: 1)
    let least = kind == "disk" ? 2 : 1
    guard (least...least + 1).contains(count) else {
      throw fields.fail("LOG ARGS", "a log '\(kind)' has \(least) or \(least + 1), not \(count)")
    }
    let log: Log = kind == "disk" ? .disk(try fields.device("LOG DEV")) : .core
    let region: UInt32 = try fields.number("REGION")
    var inSync: Bool?
    if count > least {
      let word = try fields.word("SYNC")
      guard word == "sync" || word == "nosync" else {
        throw fields.fail("SYNC", "'\(word)' is neither sync nor nosync")
      }
      inSync = word == "sync"
    }
    let legs = try fields.locations(try fields.count("MIRRORS", words: 2))
    self.init(log: log, region: region, inSync: inSync, legs: legs)
    guard !fields.isEmpty else { return }
    for _ in 0..<(try fields.count("FEATURES", words: 1)) {
      switch try fields.word("FEATURE") {
      case "handle_errors": handlesErrors = true
      case "keep_log": keepsLog = true
      case let word:
        throw fields.fail("FEATURE", "'\(word)' is neither handle_errors nor keep_log")
      }
    }
  }
}

extension Snapshot {
  init(parsing fields: inout TableFields) throws(TableError) {
    let origin = try fields.device("ORIGIN")
    let store = try fields.device("STORE")
    let word = try fields.word("PERSISTENT")
    // A status line may carry options after the letter that the constructor does not take.
    guard let persistence = Persistence(rawValue: word) else {
      throw fields.fail("PERSISTENT", "'\(word)' is none of P, PO, N")
    }
    self.init(
      origin: origin, store: store, persistence: persistence, chunk: try fields.number("CHUNK"))
    guard !fields.isEmpty else { return }
    for _ in 0..<(try fields.count("FEATURES", words: 1)) {
      let word = try fields.word("FEATURE")
      guard let feature = Feature(rawValue: word) else {
        let known = Feature.allCases.map(\.rawValue).joined(separator: ", ")
        throw fields.fail("FEATURE", "'\(word)' is none of \(known)")
      }
      features.append(feature)
    }
  }
}

extension Delay {
  init(parsing fields: inout TableFields) throws(TableError) {
    func way(_ prefix: String) throws(TableError) -> Way {
      let device = try fields.device(prefix + "DEV")
      let offset: UInt64 = try fields.number(prefix + "OFFSET")
      return Way(
        Location(device, offset: offset), milliseconds: try fields.number(prefix + "DELAY"))
    }
    self.init(reads: try way(""))
    if !fields.isEmpty { writes = try way("WRITE ") }
    if !fields.isEmpty { flushes = try way("FLUSH ") }
  }
}

extension Flakey {
  init(parsing fields: inout TableFields) throws(TableError) {
    self.init(
      try fields.location(), up: try fields.number("UP"), down: try fields.number("DOWN"))
    guard !fields.isEmpty else { return }
    for _ in 0..<(try fields.count("FEATURES", words: 1)) {
      let word = try fields.word("FEATURE")
      guard word == "error_writes" else {
        throw fields.fail("FEATURE", "'\(word)' is not error_writes")
      }
      onlyWrites = true
    }
  }
}

extension Userspace {
  init(parsing fields: inout TableFields) throws(TableError) {
    let name = try fields.word("NAME")
    let block: UInt32 = try fields.number("BLOCK_SECTORS")
    let count = try fields.count("NDEVS", words: 1)
    var devices: [Device] = []
    for number in 1..<(count + 1) {
      let word = try fields.word("DEV \(number)")
      let readOnly = word.hasPrefix("ro:")
      let reference = try fields.reference(
        readOnly ? String(word.dropFirst(3)) : word, "DEV \(number)")
      devices.append(Device(reference, readOnly: readOnly))
    }
    self.init(name: name, blockSectors: block, devices: devices)
    guard !fields.isEmpty else { return }
    let features = try fields.count("FEATURES", words: 1)
    guard features > 0 else { return }
    let word = try fields.word("FEATURE")
    guard word == "fault_timeout" else {
      throw fields.fail("FEATURE", "'\(word)' is not fault_timeout")
    }
    guard features == 2 else {
      throw fields.fail("FEATURES", "fault_timeout and its SECONDS are 2, not \(features)")
    }
    faultTimeout = try fields.number("SECONDS")
  }
}
