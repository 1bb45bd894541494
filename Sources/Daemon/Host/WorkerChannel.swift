// SPDX-License-Identifier: Apache-2.0
// The daemon's end of a worker's link, for tasks: questions with answers and a time
// limit, and news that nobody asked for.
//
// Invariants:
// - Every question ends once: answered, overdue, or with the end of the link.
// - A report that answers no waiting question is news.
// - Descriptors come with the answer to the order that asks for them and with nothing else. A
//   worker that sends others, or something that is no message, is not listened to any more.

import Synchronization
import SystemIO
internal import WorkerLink

/// What a worker says unasked.
enum WorkerNews: Sendable {
  /// Its state has changed.
  case event(DiskState, error: String)
  /// Its nbd socket has ended.
  case detached
  /// It refused an order, or said something that makes no sense.
  case complaint(String)
  /// The link has ended; why.
  case closed(String)
}

/// Why a question got no answer.
enum WorkerSilence: Error, Sendable {
  /// No answer in time.
  case overdue
  /// The link has ended, or an order could not be sent.
  case closed(String)

  /// In a few words.
  var words: String {
    switch self {
    case .overdue: "it does not answer"
    case .closed(let reason): reason
    }
  }
}

/// A report and what came with it.
struct WorkerReply: Sendable {
  let report: WorkerReport
  let descriptors: LinkDescriptors
}

/// A connected link to one worker.
final class WorkerChannel: Sendable {
  typealias Matcher = @Sendable (WorkerReport) -> Bool

  private struct Question {
    let matches: Matcher
    let answer: CheckedContinuation<Result<WorkerReply, WorkerSilence>, Never>
  }

  private struct State {
    var questions: [(number: UInt64, question: Question)] = []
    var next: UInt64 = 1
    var closed = false
    /// Pings since the worker was heard last.
    var unanswered = 0
    var reason: String?
    var registration: PollRegistration?
  }

  /// The news, for one consumer; ends with `.closed`.
  let news: AsyncStream<WorkerNews>

  private let link: LinkConnection
  private let poller: any Polling
  private let scheduler: any Scheduling
  private let tell: AsyncStream<WorkerNews>.Continuation
  private let state = Mutex(State())

  /// Takes over a link.
  init(_ link: LinkConnection, host: Host) {
    self.link = link
    poller = host.poller
    scheduler = host.scheduler
    (news, tell) = AsyncStream.makeStream(bufferingPolicy: .bufferingNewest(64))
    let registration = poller.add(link.raw) { [self] in receive() }
    state.withLock { $0.registration = registration }
  }

  /// Why the link has ended; nil while it has not.
  var closed: String? { state.withLock { $0.reason } }

  /// Ends the link; questions that wait end with it.
  func close() { finish("the daemon closed the link") }

  /// Ends the link of a worker that has ended, on the poller's thread: what it said last is
  /// heard first.
  func closeAfterLastWords() {
    _ = receive()
    finish("the worker has gone")
  }

  /// Sends an order that has no answer.
  func send(
    _ order: WorkerOrder, lending descriptors: [LinkRole: Int32] = [:]
  ) throws(WorkerSilence) {
    do {
      try link.send(order, lending: descriptors)
    } catch { throw .closed(error.description) }
  }

  /// Sends an order and waits for the report that answers it.
  func ask(
    _ order: WorkerOrder, lending descriptors: [LinkRole: Int32] = [:], within limit: Duration,
    _ matches: @escaping Matcher
  ) async throws(WorkerSilence) -> WorkerReply {
    let number = state.withLock { state in
      defer { state.next += 1 }
      return state.next
    }
    let clock = scheduler.after(limit) { [self] in
      end(number, .failure(.overdue))
    }
    defer { clock.cancel() }
    let result = await withCheckedContinuation { continuation in
      let open = state.withLock { state in
        guard !state.closed else { return false }
        state.questions.append(
          (number, Question(matches: matches, answer: continuation)))
        return true
      }
      guard open else {
        continuation.resume(returning: .failure(.closed("the worker has gone")))
        return
      }
      do throws(WorkerSilence) {
        try send(order, lending: descriptors)
      } catch { end(number, .failure(error)) }
    }
    return try result.get()
  }

  /// Asks the worker whether it lives. Answers how many such questions in a row have been sent
  /// before and nothing was heard since.
  func ping() -> Int {
    let unanswered = state.withLock { state in
      defer { state.unanswered += 1 }
      return state.unanswered
    }
    // A link that has ended is seen to elsewhere.
    do throws(WorkerSilence) { try send(.ping) } catch {}
    return unanswered
  }

  private func end(_ number: UInt64, _ result: Result<WorkerReply, WorkerSilence>) {
    let question = state.withLock { state in
      state.questions.firstIndex { $0.number == number }
        .map { state.questions.remove(at: $0).question }
    }
    question?.answer.resume(returning: result)
  }

  /// On the poller's thread: takes what is there, but only so much in a row that a worker
  /// that talks without end keeps nobody waiting.
  private func receive() -> Bool {
    for _ in 0..<64 {
      do throws(LinkError) {
        switch try link.receive() {
        case .message(let message, let descriptors):
          guard take(message, descriptors) else {
            finish("the worker sent descriptors that nobody asked for")
            return false
          }
        case .none: return true
        case .end:
          finish("the worker has gone")
          return false
        }
      } catch {
        switch error {
        case .io(let error):
          finish(error.description)
          return false
        case .fault(let fault):
          finish("the worker sent what is no message: \(fault)")
          return false
        }
      }
    }
    return true
  }

  /// False when there are descriptors that do not belong to it.
  private func take(_ message: LinkMessage, _ descriptors: LinkDescriptors) -> Bool {
    state.withLock { $0.unanswered = 0 }
    let report: WorkerReport
    do {
      report = try WorkerReport(message)
    } catch {
      tell.yield(.complaint(error.description))
      return descriptors.isEmpty
    }
    guard descriptors.roles.isSubset(of: report.roles) else { return false }
    let asked = state.withLock { state in
      state.questions.firstIndex { $0.question.matches(report) }
        .map { state.questions.remove(at: $0).question }
    }
    if let asked {
      asked.answer.resume(
        returning: .success(WorkerReply(report: report, descriptors: descriptors)))
      return true
    }
    switch report {
    case .event(let state, let error): tell.yield(.event(state, error: error))
    case .detached: tell.yield(.detached)
    // A worker of before there were pings says at least this.
    case .alive, .refused("ping", _): break
    case .stopping: tell.yield(.complaint("it says that it is told to end"))
    case .refused(let order, let message): tell.yield(.complaint("\(order): \(message)"))
    case .failed(let code, let message): tell.yield(.complaint("\(code): \(message)"))
    case .ready, .needFile, .status, .descriptors, .attached:
      tell.yield(.complaint("a late answer"))
    }
    return descriptors.isEmpty
  }

  private func finish(_ reason: String) {
    let (questions, registration) = state.withLock { state in
      defer {
        state.questions = []
        state.closed = true
        if state.reason == nil { state.reason = reason }
        state.registration = nil
      }
      return (state.questions, state.registration)
    }
    if let registration { poller.remove(registration) }
    for (_, question) in questions {
      question.answer.resume(returning: .failure(.closed(reason)))
    }
    tell.yield(.closed(reason))
    tell.finish()
  }
}
